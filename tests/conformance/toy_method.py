"""A steering method in one file, as a stranger would write it: a gate on one direction, a linear map of the query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from finesteer_hf import Decision, QueryStates, Site, SteeringConfig, register_steering_method
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod


@dataclass(kw_only=True)
class ToyConfig(SteeringConfig):
    """Settings: what a user may choose, and what the fit fills in. They are the keys of `steering_config.json`."""

    steering_type: ClassVar[str] = "TOY"
    layer: int = field(default=1, metadata={"help": "Block that is read and written."})
    share: float = field(default=0.5, metadata={"help": "Share of the fitted prompts that are steered."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}.")


class ToyMethod(SteeringMethod[ToyConfig]):
    """`H <- H + strength * g(h_q) * (shift + map h_q)`, g = 1 where shift . h_q is above a threshold."""

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
        if config.layer >= info.num_layers:
            raise ValueError(f"layer={config.layer} is out of range: the model has {info.num_layers} layers.")
        return CaptureRequest((Site("resid_post", config.layer),))

    @classmethod
    def fit(cls, data: FitData, config: ToyConfig) -> FitResult:
        site = Site("resid_post", config.layer)
        shift = torch.tensor(data.chosen(site, "fit") - data.rejected(site, "fit")).mean(0)
        scores = torch.tensor(data.query(site, "fit")) @ shift
        tensors = {
            "shift": shift,
            "map": 0.1 * torch.eye(data.info.hidden_size),
            "threshold": scores.quantile(1 - config.share)[None],
        }
        held_out = torch.tensor(data.query(site, "validation")) @ shift > tensors["threshold"]
        return FitResult(replace(config, strength=1.0), tensors, {"held_out_share": float(held_out.float().mean())})


register_steering_method(ToyMethod)
