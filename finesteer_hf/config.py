"""What is written in `steering_config.json`, and the registry of steering methods.

A config is a dataclass a method; its fields are the file's keys. A file says which features its reader must understand
(`requires`): a reader that does not know one of them refuses, where dropping an unknown key could change what the
adapter does.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import warnings
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from finesteer_hf.errors import AdapterFileError, UnknownMethodError
from finesteer_hf.processors import POSITIONS, Positions


if TYPE_CHECKING:
    from finesteer_hf.methods.base import SteeringMethod


CONFIG_NAME = "steering_config.json"
WEIGHTS_NAME = "steering_model.safetensors"
FORMAT_VERSION = 1
ENTRY_POINT_GROUP = "finesteer_hf.methods"
# A config is a page of settings and figures; anything larger is not one.
MAX_CONFIG_BYTES = 16 * 1024 * 1024

ConfigT = TypeVar("ConfigT", bound="SteeringConfig")


@dataclass(kw_only=True)
class SteeringConfig:
    """Fields that every steering adapter has.

    Attributes:
        base_model_name_or_path: Hub id or path of the model that the adapter was fitted on.
        base_model_revision: commit of that model, if it is known.
        base_model_type: its `config.model_type`.
        hidden_size: width of its residual stream.
        num_hidden_layers: number of its decoder blocks.
        lora: names of the LoRA adapters that were active when it was fitted.
        positions: tokens that are steered: `all`, `prompt` or `generated`.
        strength: lambda of the update; a number once fitted.
        requires: features that a reader must understand, or refuse the file.
        fit: how it was fitted: data, seed, versions, held-out figures. Not needed to steer.
    """

    steering_type: ClassVar[str] = ""
    understands: ClassVar[frozenset[str]] = frozenset()

    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or path of the base model."})
    base_model_revision: str | None = field(default=None, metadata={"help": "Commit of the base model."})
    base_model_type: str | None = field(default=None, metadata={"help": "config.model_type of the base model."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of decoder blocks."})
    lora: list[str] = field(default_factory=list, metadata={"help": "LoRA adapters active at fit."})
    positions: Positions = field(default="all", metadata={"help": "Steered tokens: all, prompt or generated."})
    strength: float | str = field(default=1.0, metadata={"help": "Lambda of the update."})
    requires: list[str] = field(default_factory=list, metadata={"help": "Features that a reader must understand."})
    fit: dict[str, Any] = field(default_factory=dict, metadata={"help": "Provenance and held-out figures."})

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {list(POSITIONS)}, got {self.positions!r}.")
        if isinstance(self.strength, (int, float)) and not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}.")

    def to_dict(self) -> dict[str, Any]:
        """The content of `steering_config.json`."""
        return {
            "format_version": FORMAT_VERSION,
            "steering_type": self.steering_type,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
        }

    @classmethod
    def from_dict(cls: type[ConfigT], data: dict[str, Any]) -> ConfigT:
        """Build a config from a file's content; the class comes from `steering_type`.

        Raises:
            AdapterFileError: for a format or a required feature that this version does not understand, and for fields
                of a wrong kind.
            UnknownMethodError: if no installed package provides the `steering_type`.
        """
        if not isinstance(data, dict) or not isinstance(data.get("steering_type"), str):
            raise AdapterFileError(f"{CONFIG_NAME} must hold a JSON object with a text `steering_type`.")
        version = data.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise AdapterFileError(
                f"{CONFIG_NAME} has format_version {version!r}; this finesteer_hf reads up to {FORMAT_VERSION}. Upgrade it."
            )
        config_cls = get_steering_method(data["steering_type"]).config_cls
        if not issubclass(config_cls, cls):
            raise AdapterFileError(
                f"The adapter is of steering_type {data['steering_type']!r}, not one that {cls.__name__} reads. Use "
                "`SteeringConfig.from_pretrained` or `SteeringAdapter.from_pretrained`, which take any."
            )
        requires = data.get("requires", [])
        if not isinstance(requires, list):
            raise AdapterFileError(f"`requires` in {CONFIG_NAME} must be a list of feature names, got {requires!r}.")
        missing = sorted(str(name) for name in requires if name not in config_cls.understands)
        if missing:
            raise AdapterFileError(
                f"The adapter requires features that this finesteer_hf does not understand: {missing}. "
                f"Understood for {data['steering_type']}: {sorted(config_cls.understands)}. Upgrade finesteer_hf."
            )
        names = {f.name for f in dataclasses.fields(config_cls)}
        unknown = sorted(set(data) - names - {"format_version", "steering_type"})
        if unknown:
            warnings.warn(
                f"{CONFIG_NAME} has keys that this version does not know and does not need: {unknown}.", stacklevel=3
            )
        try:
            return config_cls(**{name: value for name, value in data.items() if name in names})
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"{CONFIG_NAME} cannot be read as {config_cls.__name__}: {error}") from error

    def save_pretrained(self, save_directory: str | Path) -> Path:
        """Write `steering_config.json` into a folder and return its path."""
        path = Path(save_directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        # NaN is no JSON: a config that cannot be read back by every JSON reader must fail here.
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls: type[ConfigT], name_or_path: str | Path, **hub_kwargs: Any) -> ConfigT:
        """Read the config of a folder or a Hub repo, without its weights.

        Args:
            name_or_path: a folder, `org/name` or `org/name@revision`.
            **hub_kwargs: as for `SteeringAdapter.from_pretrained`.
        """
        from finesteer_hf.hub import resolve_adapter_files

        return cls.from_json_file(resolve_adapter_files(name_or_path, weights=False, **hub_kwargs).config)

    @classmethod
    def from_json_file(cls: type[ConfigT], path: str | Path) -> ConfigT:
        """Read a `steering_config.json`.

        Raises:
            AdapterFileError: if it is too large, no JSON, or repeats a key.
        """
        path = Path(path)
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterFileError(
                f"{path.name} has {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES} are read."
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_nan)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise AdapterFileError(f"{path.name} is not readable JSON: {error}") from error
        return cls.from_dict(data)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise AdapterFileError(f"{CONFIG_NAME} repeats a key among {sorted(set(keys))[:20]}.")
    return dict(pairs)


def _no_nan(text: str) -> float:
    raise AdapterFileError(f"{CONFIG_NAME} holds {text}, which is no JSON number.")


@dataclass(frozen=True)
class MethodSpec:
    """An entry of the registry."""

    name: str
    config_cls: type[SteeringConfig]
    method_cls: type[SteeringMethod]


_REGISTRY: dict[str, MethodSpec] = {}


def register_steering_method(
    name: str, *, config_cls: type[SteeringConfig], method_cls: type[SteeringMethod]
) -> MethodSpec:
    """Make a steering method known under a name.

    A package may do so at import and name its module in the entry point group `finesteer_hf.methods`: then the method is
    found without anybody importing it.

    Raises:
        ValueError: if another class already has the name, or the config's `steering_type` is another.
    """
    if config_cls.steering_type != name:
        raise ValueError(f"{config_cls.__name__}.steering_type is {config_cls.steering_type!r}, expected {name!r}.")
    known = _REGISTRY.get(name)
    if known is not None and known.method_cls is not method_cls:
        raise ValueError(f"Steering method {name!r} is already registered by {known.method_cls.__module__}.")
    _REGISTRY[name] = MethodSpec(name, config_cls, method_cls)
    return _REGISTRY[name]


def _declared_methods() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def steering_methods() -> list[str]:
    """Names of all methods that are registered or declared by an installed package."""
    importlib.import_module("finesteer_hf.methods")
    return sorted({*_REGISTRY, *_declared_methods()})


def get_steering_method(name: str) -> MethodSpec:
    """Look a method up, importing the package that declares it.

    Raises:
        UnknownMethodError: if there is none of that name.
    """
    importlib.import_module("finesteer_hf.methods")
    if name not in _REGISTRY:
        declared = _declared_methods()
        if name in declared:
            importlib.import_module(declared[name].partition(":")[0])
    if name not in _REGISTRY:
        raise UnknownMethodError(name, steering_methods())
    return _REGISTRY[name]
