"""Steering adapters for Hugging Face models.

Everything here is imported on first use: torch and transformers take seconds, and `finesteer --help` needs neither.
The configs of all methods are here too: `from finesteer_hf import FASBConfig`.
"""

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any


# For type checkers, where `as` marks a name as public; at run time the names come from `_HOMES` and the registry.
if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import LoadReport as LoadReport
    from finesteer_hf.adapters.adapter import SteeringAdapter as SteeringAdapter
    from finesteer_hf.adapters.config import SteeringConfig as SteeringConfig
    from finesteer_hf.adapters.registry import register_steering_method as register_steering_method
    from finesteer_hf.adapters.registry import steering_methods as steering_methods
    from finesteer_hf.fitting import fit_steering as fit_steering
    from finesteer_hf.hub import list_adapters as list_adapters
    from finesteer_hf.methods.caa import CAAConfig as CAAConfig
    from finesteer_hf.methods.finesteer import FineSteerConfig as FineSteerConfig
    from finesteer_hf.model.auto import SteeredModelForCausalLM as SteeredModelForCausalLM
    from finesteer_hf.model.verbs import SteeringMixin as SteeringMixin
    from finesteer_hf.processors import ConstantVector as ConstantVector
    from finesteer_hf.processors import Decision as Decision
    from finesteer_hf.processors import QueryStates as QueryStates
    from finesteer_hf.processors import SteeringProcessor as SteeringProcessor
    from finesteer_hf.processors import SteeringProcessorList as SteeringProcessorList
    from finesteer_hf.processors import TokenView as TokenView
    from finesteer_hf.sites import Site as Site

__version__: str

# The module of each name; config names are in the registry.
_HOMES = {
    "adapters.adapter": ("LoadReport", "SteeringAdapter"),
    "model.auto": ("SteeredModelForCausalLM",),
    "adapters.config": ("SteeringConfig",),
    "adapters.registry": ("register_steering_method", "steering_methods"),
    "fitting": ("fit_steering",),
    "hub": ("list_adapters",),
    "model.verbs": ("SteeringMixin",),
    "processors": (
        "ConstantVector",
        "Decision",
        "QueryStates",
        "SteeringProcessor",
        "SteeringProcessorList",
        "TokenView",
    ),
    "sites": ("Site",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    elif name == "__version__":
        return importlib.metadata.version("finesteer-hf")
    elif name == "__all__":
        value = sorted([*_HOME_OF, *_method_configs()])
    elif name.endswith("Config") and name in _method_configs():
        value = _method_configs()[name]
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        # `import finesteer_hf` alone makes `finesteer_hf.processors` available.
        return importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOME_OF:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


def _method_configs() -> dict[str, Any]:
    """The configs of all methods by the names of their classes."""
    from finesteer_hf.adapters.registry import get_steering_method, steering_methods

    configs = (get_steering_method(method).config_cls for method in steering_methods())
    return {config.__name__: config for config in configs}
