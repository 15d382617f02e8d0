"""Steering adapters for Hugging Face models."""

from typing import TYPE_CHECKING, Any

from finesteer_hf.adapter import LoadReport, SteeringAdapter
from finesteer_hf.auto import SteeredModelForCausalLM
from finesteer_hf.config import SteeringConfig, register_steering_method, steering_methods
from finesteer_hf.hub import list_adapters
from finesteer_hf.methods.caa import CAAConfig
from finesteer_hf.methods.finesteer import FineSteerConfig
from finesteer_hf.mixin import SteeringMixin
from finesteer_hf.processors import (
    ConstantVector,
    Decision,
    QueryStates,
    SteeringProcessor,
    SteeringProcessorList,
    TokenView,
)
from finesteer_hf.sites import Site


if TYPE_CHECKING:
    from finesteer_hf.fitting import fit_steering

__version__ = "0.1.0"

__all__ = [
    "CAAConfig",
    "ConstantVector",
    "Decision",
    "FineSteerConfig",
    "LoadReport",
    "QueryStates",
    "Site",
    "SteeredModelForCausalLM",
    "SteeringAdapter",
    "SteeringConfig",
    "SteeringMixin",
    "SteeringProcessor",
    "SteeringProcessorList",
    "TokenView",
    "fit_steering",
    "list_adapters",
    "register_steering_method",
    "steering_methods",
]


def __getattr__(name: str) -> Any:
    # Fitting brings data sets and plots along; who only steers does not wait for them.
    if name == "fit_steering":
        from finesteer_hf.fitting import fit_steering

        return fit_steering
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
