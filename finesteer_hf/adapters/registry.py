"""The registry of steering methods: the config and the class of each name."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

from finesteer_hf.errors import UnknownMethodError


if TYPE_CHECKING:
    from finesteer_hf.adapters.config import SteeringConfig
    from finesteer_hf.method_api import SteeringMethod


ENTRY_POINT_GROUP = "finesteer_hf.methods"


@dataclass(frozen=True)
class MethodSpec:
    """An entry of the registry."""

    name: str
    config_cls: type[SteeringConfig]
    method_cls: type[SteeringMethod[Any]]

    @property
    def summary(self) -> str:
        """What the method does: the first line of its module's or package's docstring, without the name."""
        module: ModuleType | None = sys.modules[self.method_cls.__module__]
        folder = sys.modules.get(self.method_cls.__module__.rpartition(".")[0])
        if getattr(folder, self.method_cls.__name__, None) is self.method_cls:
            module = folder
        line = (getattr(module, "__doc__", None) or "").strip().split("\n")[0].removeprefix(f"{self.name}: ")
        return line[:1].upper() + line[1:]


_REGISTRY: dict[str, MethodSpec] = {}


@overload
def register_steering_method(method: type[SteeringMethod[Any]], /) -> MethodSpec: ...


@overload
def register_steering_method(
    name: str, *, config_cls: type[SteeringConfig], method_cls: type[SteeringMethod[Any]]
) -> MethodSpec: ...


def register_steering_method(
    name: str | type[SteeringMethod[Any]],
    *,
    config_cls: type[SteeringConfig] | None = None,
    method_cls: type[SteeringMethod[Any]] | None = None,
) -> MethodSpec:
    """Register a steering method under its config's `steering_type`: `register_steering_method(MyMethod)`.

    A package can do this at import and name its module in the entry point group `finesteer_hf.methods`: the method is
    then found without an import. Methods of this package have their module in `finesteer_hf.methods.BUILT_IN`.

    Packages written for earlier versions pass name, config and method.

    Raises:
        TypeError: if the method does not declare its config class.
        ValueError: if another class has the name already, or the config has no `steering_type` or one that differs
            from `name`.
    """
    method_cls = method_cls if isinstance(name, str) else name
    config_cls = config_cls or getattr(method_cls, "config_cls", None)
    if method_cls is None or config_cls is None:
        raise TypeError(
            f"{name if method_cls is None else method_cls.__name__} has no config. Write `class MyMethod(SteeringMethod["
            "MyConfig])`, then `register_steering_method(MyMethod)`."
        )
    name = name if isinstance(name, str) else config_cls.steering_type
    if not name:
        raise ValueError(f"{config_cls.__name__} has no steering_type; set it to the method's name.")
    if config_cls.steering_type != name:
        raise ValueError(f"{config_cls.__name__}.steering_type is {config_cls.steering_type!r}, expected {name!r}.")
    known = _REGISTRY.get(name)
    if known is not None and known.method_cls is not method_cls:
        raise ValueError(f"Steering method {name!r} is already registered by {known.method_cls.__module__}.")
    _REGISTRY[name] = MethodSpec(name, config_cls, method_cls)
    return _REGISTRY[name]


def _declared_methods() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def _register_built_in() -> None:
    """Import the methods of this package, each of which registers itself."""
    # Not at the top: methods import this module.
    for module in importlib.import_module("finesteer_hf.methods").BUILT_IN:
        importlib.import_module(f"finesteer_hf.methods.{module}")


def steering_methods() -> list[str]:
    """Names of all methods that are registered or declared by an installed package."""
    _register_built_in()
    return sorted({*_REGISTRY, *_declared_methods()})


def get_steering_method(name: str) -> MethodSpec:
    """Look up a method, importing the package that declares it.

    Raises:
        UnknownMethodError: if no method has that name.
    """
    _register_built_in()
    if name not in _REGISTRY:
        declared = _declared_methods()
        if name in declared:
            importlib.import_module(declared[name].partition(":")[0])
    if name not in _REGISTRY:
        raise UnknownMethodError(name, steering_methods())
    return _REGISTRY[name]
