"""The data of a fit on the toy model, kept for tests of a part of a fit."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from finesteer_hf import Decision, QueryStates, Site, SteeringConfig, fit_steering
from finesteer_hf.adapters.registry import _REGISTRY, register_steering_method
from finesteer_hf.fitting.capture.captured import CapturedData
from finesteer_hf.method_api import CaptureRequest, FitResult, ModelInfo, SteeringMethod
from finesteer_hf.testing import toy_general_prompts, toy_model, toy_preferences, toy_tokenizer


@dataclass(kw_only=True)
class KeepingConfig(SteeringConfig):
    steering_type: ClassVar[str] = "TEST_KEEPING"
    sites: tuple[str, ...] = field(default=())


class Keeping(SteeringMethod):
    """Fits nothing and keeps its data."""

    config_cls = KeepingConfig
    data: ClassVar[Any]

    def decide(self, queries: QueryStates) -> Decision:
        return Decision({})

    @classmethod
    def tensor_shapes(cls, config: SteeringConfig) -> dict[str, tuple[int | None, ...]]:
        return {"nothing": (1,)}

    @classmethod
    def needs(cls, config: Any, info: ModelInfo) -> CaptureRequest:
        return CaptureRequest(tuple(map(Site.parse, config.sites)), ("query", "answer_mean", "gradient"))

    @classmethod
    def fit(cls, data: Any, config: Any) -> FitResult:
        Keeping.data = data
        return FitResult(replace(config, strength=1.0), {"nothing": torch.zeros(1)})


@functools.cache
def kept_data(*sites: str, rows: int = 48) -> CapturedData:
    """`FitData` of the toy model and its rows, with states and gradients at some sites."""
    register_steering_method("TEST_KEEPING", config_cls=KeepingConfig, method_cls=Keeping)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_steering(
                toy_model(),
                toy_tokenizer(),
                toy_preferences(rows),
                KeepingConfig(sites=sites),
                general_dataset=toy_general_prompts(),
                progress=False,
            )
    finally:
        del _REGISTRY["TEST_KEEPING"]
    return Keeping.data
