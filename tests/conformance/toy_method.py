"""A steering method in one file, as a stranger would write it: a gate on one coordinate, a linear map of the query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from finesteer_hf import Decision, QueryStates, Site, SteeringConfig, register_steering_method
from finesteer_hf.methods.base import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod


@dataclass(kw_only=True)
class ToyConfig(SteeringConfig):
    steering_type: ClassVar[str] = "TOY"
    layer: int = field(default=1, metadata={"help": "Block that is read and written."})


class ToyMethod(SteeringMethod):
    config_cls = ToyConfig

    def __init__(self, config: ToyConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        self.site = Site("resid_post", config.layer)
        self.reads = self.writes = (self.site,)

    @classmethod
    def tensor_shapes(cls, config: ToyConfig) -> dict[str, tuple[int | None, ...]]:
        width = config.hidden_size
        return {"shift": (width,), "map": (width, width), "threshold": (1,)}

    def decide(self, queries: QueryStates) -> Decision:
        own, state = self.parameters_on(queries.device), queries[self.site]
        score = state @ own["shift"]
        gate = (score > own["threshold"]).float()
        return Decision({self.site: own["shift"] + state @ own["map"]}, gate, {"score": score})

    @classmethod
    def needs(cls, config: ToyConfig, info: ModelInfo) -> CaptureRequest:
        return CaptureRequest((Site("resid_post", config.layer),))

    @classmethod
    def fit(cls, data: FitData, config: ToyConfig) -> FitResult:
        site = Site("resid_post", config.layer)
        shift = torch.tensor(data.chosen(site, "fit") - data.rejected(site, "fit")).mean(0)
        scores = torch.tensor(data.query(site, "fit")) @ shift
        width = data.info.hidden_size
        tensors = {"shift": shift, "map": 0.1 * torch.eye(width), "threshold": scores.median()[None]}
        return FitResult(replace(config, strength=1.0), tensors)


register_steering_method("TOY", config_cls=ToyConfig, method_cls=ToyMethod)
