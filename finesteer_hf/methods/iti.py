"""ITI, inference-time intervention: constant shifts of the heads that detect truth best (Li et al., NeurIPS 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.adapters.tensor_files import HEAD_SIZE, Shape
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod
from finesteer_hf.methods._shared.heads import HeadFit, fit_heads, head_sites
from finesteer_hf.methods._shared.heads_config import HeadsConfig, dense_shift, require_heads
from finesteer_hf.processors import Decision, QueryStates, SteeringProcessor


@dataclass(kw_only=True)
class ITIConfig(HeadsConfig):
    """Settings of ITI (arXiv 2306.03341); fields as in `HeadsConfig`.

    The paper shifts the last position of every forward: the prompt's last token, then each generated one. With a cache
    these are the positions `generated`, which a forward over prompt and answer steers too.
    """

    steering_type: ClassVar[str] = "ITI"
    published_count: ClassVar[int] = 48

    @classmethod
    def paper(cls, **overrides: Any) -> ITIConfig:
        """The paper's settings for 7B models: 48 heads, alpha 15, differences of the class means."""
        return cls(**{"num_heads": cls.published_count, "strength": 15.0, "direction": "centre", **overrides})


class ITI(SteeringMethod[ITIConfig]):
    """`x^{l,h} <- x^{l,h} + strength * sigma^{l,h} * theta^{l,h}` at the outputs of the chosen heads.

    Args:
        config: a fitted `ITIConfig`.
        tensors: `directions` `[k, head size]` of length 1, and `sigma` `[k]`, float32.
    """

    def __init__(self, config: ITIConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_heads(config, tensors, ("directions", "sigma"))
        of_site = config.of_site
        self.writes = tuple(of_site)
        shifts = tensors["sigma"][:, None] * tensors["directions"]
        self.tensors = {str(site): dense_shift(config, rows, shifts) for site, rows in of_site.items()}

    def decide(self, queries: QueryStates) -> Decision:
        """The shifts, `[1, heads * head size]` at each block."""
        own = self.parameters_on(queries.device)
        return Decision(vectors={site: own[str(site)][None] for site in self.writes})

    @classmethod
    def tensor_shapes(cls, config: ITIConfig) -> dict[str, Shape]:
        """One row per head."""
        count = len(config.heads)
        return {"directions": (count, HEAD_SIZE), "sigma": (count,)}

    @classmethod
    def needs(cls, config: ITIConfig, info: ModelInfo) -> CaptureRequest:
        """The head outputs of the probed blocks; see `head_sites`."""
        return head_sites(config, info)

    @classmethod
    def fit(cls, data: FitData, config: ITIConfig) -> FitResult:
        """Choose the heads on the `calibration` part, their number and alpha on `validation`.

        Raises:
            DatasetError: for too few rows.
        """

        def build(found: HeadFit, strength: float) -> SteeringProcessor:
            return cls(found.filled_in(config, data.info, strength), _tensors(found))

        found, strength, report = fit_heads(data, config, build)
        return FitResult(found.filled_in(config, data.info, strength), _tensors(found), report)


def _tensors(found: HeadFit) -> dict[str, torch.Tensor]:
    return {name: found.tensors[name] for name in ("directions", "sigma")}


register_steering_method(ITI)
