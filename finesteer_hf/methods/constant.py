"""CONSTANT: vectors that are added at one or more sites, for every query.

Other libraries call it a control vector or a steering vector. It is not fitted here, but read from their files, made
by hand, or combined from other constant adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.adapters.tensor_files import Free, Shape, vector_name
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import INNER_KINDS, Site, SiteKind


_NOT_FITTED = (
    "CONSTANT has vectors that were made elsewhere and is not fitted. Read them with finesteer_hf.interop.load_vectors, "
    "or fit a method such as CAA."
)


@dataclass(kw_only=True)
class ConstantConfig(SteeringConfig):
    """Where the vectors are added.

    Attributes:
        layers: decoder blocks, each with a tensor `vectors.<layer>`.
        site: steered site of each block: `resid_post` (its output), `resid_pre` (its input), `head_out` or `mlp_act`.
    """

    steering_type: ClassVar[str] = "CONSTANT"

    layers: list[int] = field(default_factory=list, metadata=setting("Steered decoder blocks."))
    site: SiteKind = field(
        default="resid_post", metadata=setting("resid_pre, head_out, mlp_act or resid_post of each block.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.site == "attention":
            raise ValueError("site='attention' can be read but not steered.")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers names a block twice: {self.layers[:50]}.")
        for site in self.sites:
            if self.num_hidden_layers is not None and site.layer >= self.num_hidden_layers:
                raise ValueError(f"{site} is out of range for a model of {self.num_hidden_layers} layers.")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of `layers`."""
        return tuple(Site(self.site, layer) for layer in self.layers)


class ConstantVectors(SteeringMethod[ConstantConfig]):
    """`H <- H + strength * v_l` at the site of each block l.

    Args:
        config: a `ConstantConfig`.
        tensors: `vectors.<layer>`, `[width]` float32.
    """

    def __init__(self, config: ConstantConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        self.writes = config.sites
        if not self.writes:
            raise AdapterFileError("The CONSTANT adapter names no layer, so it would steer nothing.")

    def decide(self, queries: QueryStates) -> Decision:
        """The vectors, `[1, width]` at each site."""
        tensors = self.parameters_on(queries.device)
        return Decision(vectors={site: tensors[vector_name(site)][None] for site in self.writes})

    @classmethod
    def tensor_shapes(cls, config: ConstantConfig) -> dict[str, Shape]:
        """One vector per layer; as wide as the residual stream, or as all heads or neurons of a block.

        Raises:
            AdapterFileError: if the width of the residual stream is not in the config.
        """
        if config.hidden_size is None and config.site not in INNER_KINDS:
            raise AdapterFileError(
                "The CONSTANT config has no hidden_size, so its vectors cannot be checked against a model."
            )
        # Heads and feed-forwards of different blocks may have different sizes.
        return {
            vector_name(site): (Free(f"width of {site}") if config.site in INNER_KINDS else config.hidden_size,)
            for site in config.sites
        }

    @classmethod
    def needs(cls, config: ConstantConfig, info: ModelInfo) -> CaptureRequest:
        """Raises `ValueError`: there is nothing to fit."""
        raise ValueError(_NOT_FITTED)

    @classmethod
    def fit(cls, data: FitData, config: ConstantConfig) -> FitResult:
        """Raises `ValueError`: there is nothing to fit."""
        raise ValueError(_NOT_FITTED)


register_steering_method(ConstantVectors)
