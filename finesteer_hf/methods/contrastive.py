"""CONTRASTIVE: steering at the logits, by the contrast of the steered model with the unsteered one.

    logits = base + alpha (steered - base)

`steered` are the logits with a constant vector added (CAA's vector), `base` those without, from a second stream with
its own cache, as in transformers' classifier-free guidance. alpha = 1 is the vector alone; more extrapolates the
vector's change of the logits and leaves the rest unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from transformers import LogitsProcessor

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod
from finesteer_hf.methods._shared.checks import check_layer, check_one_of, check_strength, filled_in, require_fitted
from finesteer_hf.methods._shared.search import settle
from finesteer_hf.methods._shared.trials import Trial
from finesteer_hf.methods.caa import CAA, CAAConfig
from finesteer_hf.processors import Positions, TokenView
from finesteer_hf.sites import Site, resid_post


POOLS = ("answer_mean", "answer_last")
# 1 is the vector alone.
STRENGTHS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(kw_only=True)
class ContrastiveConfig(SteeringConfig):
    """Settings of contrastive steering.

    Attributes:
        layer: decoder block whose output gets the vector; `auto` as for CAA.
        pool: answer states that the vector is fitted to.
        vector_strength: factor of the vector in the stream, chosen like CAA's strength.
        strength: alpha, the factor of the contrast at the logits.
    """

    steering_type: ClassVar[str] = "CONTRASTIVE"

    positions: Positions = field(default="generated", metadata=setting("Tokens that get the vector."))
    strength: float | str = field(default="auto", metadata=setting("Alpha: a number, auto or kl:<nats>."))
    layer: int | str = field(default="auto", metadata=setting("Steered decoder block, or auto."))
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata=setting("Pooled answer states: answer_mean or answer_last.")
    )
    vector_strength: float | str = field(
        default="auto", metadata=setting("Factor of the vector: a number, auto, kl:<nats> or norm:<share>.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_one_of("pool", self.pool, POOLS)
        check_strength(self.strength, ("kl",))
        check_strength(self.vector_strength)
        if self.positions == "prompt":
            raise ValueError("positions='prompt' is not possible: the contrast steers generated tokens.")

    def vector_config(self) -> CAAConfig:
        """The settings of the vector's fit."""
        return CAAConfig(
            layer=self.layer, pool=self.pool, strength=self.vector_strength, positions=self.positions, vector="answers"
        )


class ContrastWithUnsteered(LogitsProcessor):
    """base + alpha (scores - base), with `base` the unsteered model's logits.

    Args:
        unsteered: returns base `[rows, vocabulary]` for `input_ids` `[rows, tokens]`.
        scale: run-time scale, a number or `[rows]`; rows of 0 are unsteered and stay as they are.
        alpha: strength of the contrast.
    """

    def __init__(
        self, unsteered: Callable[[torch.Tensor], torch.Tensor], scale: torch.Tensor | float, alpha: float
    ) -> None:
        self.unsteered, self.scale, self.alpha = unsteered, scale, alpha

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Contrast logits `scores` `[rows, vocabulary]`."""
        base = self.unsteered(input_ids).to(scores.device)
        scale = torch.as_tensor(self.scale, dtype=torch.float32, device=scores.device).reshape(-1, 1)
        contrast = base + scale * self.alpha * (scores - base)
        # Tokens that other processors forbid stay forbidden.
        return torch.where((scale == 0) | scores.isinf(), scores, contrast.to(scores.dtype))


class Contrastive(SteeringMethod[ContrastiveConfig]):
    """Add a constant vector in the stream, and contrast the resulting logits with the unsteered model's.

    `steering_scale` multiplies alpha, not the vector. The contrast comes after transformers' own processors, so
    penalties count once, and guidance is contrasted with the unguided, unsteered model.

    Args:
        config: a fitted `ContrastiveConfig`.
        tensors: `vector`, `[hidden_size]` float32.
    """

    refuses = {
        "inputs_embeds": "the unsteered model needs the text as token ids",
        "carried_cache": "a loop of plain forwards has no cache for the unsteered model",
    }

    def __init__(self, config: ContrastiveConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_fitted(config, "layer")
        if "vector" not in tensors or not isinstance(config.vector_strength, (int, float)):
            raise AdapterFileError("A CONTRASTIVE adapter needs the tensor 'vector' and a number as vector_strength.")
        self.maps = (resid_post(config.layer),)
        self.vector_strength = float(config.vector_strength)

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Add the vector to the selected tokens of steered rows, whatever their scale."""
        steered = view.scale != 0
        if view.mask is not None:
            steered = steered & view.mask[..., None]
        delta = (self.vector_strength * self.parameters_on(hidden.device)["vector"]).to(hidden.dtype)
        return hidden + torch.where(steered, delta, -0.0)

    def contrast_processors(
        self, scale: torch.Tensor | float, unsteered: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[Any]:
        """The contrast for a call's rows."""
        return [ContrastWithUnsteered(unsteered, scale, self.strength)]

    @classmethod
    def tensor_shapes(cls, config: ContrastiveConfig) -> dict[str, tuple[int | None, ...]]:
        """One vector of the residual stream."""
        return {"vector": (config.hidden_size,)}

    @classmethod
    def needs(cls, config: ContrastiveConfig, info: ModelInfo) -> CaptureRequest:
        """What CAA needs.

        Raises:
            ValueError: if the layer is out of range.
        """
        return CAA.needs(config.vector_config(), info)

    @classmethod
    def fit(cls, data: FitData, config: ContrastiveConfig) -> FitResult:
        """Fit the vector as CAA does, then choose alpha on `validation`.

        Raises:
            DatasetError: for too few rows.
        """
        vector = CAA.fit(data, config.vector_config())
        own = cast(CAAConfig, vector.config)

        def build(strength: float) -> Contrastive:
            chosen = {"layer": own.layer, "vector_strength": own.strength, "strength": strength}
            return cls(filled_in(config, data.info, **chosen), vector.tensors)

        strength, settled = settle(data, config.strength, Trial.of_factor(build), None, STRENGTHS)
        report: dict[str, Any] = {**settled, "vector": vector.report}
        return FitResult(build(strength).config, vector.tensors, report)


register_steering_method(Contrastive)
