"""SADI: amplifies each input's own activations at the few elements that separate answers (arXiv 2410.12299, ICLR
2025).

A binary mask M marks the K elements (attention heads, neurons of the feed-forwards, or dimensions of the stream) of all
layers whose mean difference between wanted and unwanted answers, at the answers' last token, is largest. Steering is
A' = A + delta (A * M).

Differences from the published code. It *replaces*: the marked elements of the question's last token become delta times
their unsteered activations, and generated tokens are left unchanged; `compat="official"` does this. It takes K and
delta from the best score on the test set; here they are chosen on held-out rows, K from the published values, and
delta too with `compat="official"`. Its "hidden" elements are in the feed-forward's output, here they are in the stream
after the block. Its neurons are the activation function's outputs; here they are the inputs of the last projection,
which in gated feed-forwards is their product with the up projection. Amplifying one amplifies the other equally; the
marks, and what `compat="official"` replaces, refer to the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from finesteer_hf.adapters.config import MOST_HEADS, SteeringConfig, setting, written_by_fit
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.adapters.tensor_files import NEURONS, Indices, Shape
from finesteer_hf.errors import AdapterFileError, DatasetError, UnsupportedModelError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, Part, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_count,
    check_layers,
    check_one_of,
    check_strength,
    filled_in,
    require_fitted,
)
from finesteer_hf.methods._shared.moments import mean_difference
from finesteer_hf.methods._shared.search import search
from finesteer_hf.methods._shared.strength import median_norm
from finesteer_hf.methods._shared.trials import Trial, candidate_layers
from finesteer_hf.processors import Decision, Positions, QueryStates, TokenView
from finesteer_hf.sites import Site, SiteKind


# Site of each kind of elements.
SITES: dict[str, SiteKind] = {"head": "head_out", "neurons": "mlp_act", "hidden": "resid_post"}
# Values that `auto` tries, as published; the first is taken if no rows are held out.
COUNTS = {
    "head": (8, 1, 2, 4, 6, 10),
    "neurons": (100, 3, 5, 10, 30, 50, 200, 300, 400, 500),
    "hidden": (8, 1, 2, 4, 6, 10, 12, 14, 16, 18, 20),
}
# The published strengths: an element is replaced by so many times its unsteered activation.
STRENGTHS = {
    "head": tuple(range(5, 85, 5)),
    "neurons": (10, 20, 30, 50, 70, 90),
    "hidden": tuple(range(5, 85, 5)),
}
MIN_ROWS = 2


@dataclass(kw_only=True)
class SADIConfig(SteeringConfig):
    """Settings of semantics-adaptive dynamic intervention.

    Attributes:
        elements: amplified elements: whole attention heads (`head`, by the mean over a head's dimensions), neurons
            inside the feed-forwards (`neurons`) or single dimensions of the blocks' outputs (`hidden`).
        num_elements: K, number of amplified elements; `auto` tries the published ones: 1 to 10 heads, 3 to 500 neurons, 1
            to 20 dimensions.
        layers: blocks whose elements are compared; `auto` is all of them.
        compat: `official` replaces the query's elements, like the published code.
        element_layers: the blocks that contain the K elements, ascending; filled in by the fit.
        attention_heads: number of heads of each block, filled in by the fit.
    """

    steering_type: ClassVar[str] = "SADI"
    understands: ClassVar[frozenset[str]] = frozenset({"compat:official", "elements:neurons"})

    # The paper steers the newest token of every forward: the prompt's last, then each generated one.
    positions: Positions = field(default="generated", metadata=setting("Steered tokens: generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Delta: a number, auto, kl:<nats> or norm:<share>.")
    )
    elements: Literal["head", "neurons", "hidden"] = field(
        default="head", metadata=setting("Amplified elements: head, neurons or hidden.")
    )
    num_elements: int | str = field(default="auto", metadata=setting("Number of amplified elements, or auto."))
    layers: list[int] | str = field(default="auto", metadata=setting("Compared blocks, or auto for all."))
    compat: str | None = field(default=None, metadata=setting("official: replace the query's elements."))
    element_layers: list[int] = field(default_factory=list, metadata=written_by_fit("Blocks of the elements."))
    attention_heads: int | None = field(
        default=None, metadata=written_by_fit("Heads of each block.", least=1, most=MOST_HEADS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("positions", self.positions, ("generated",))
        check_one_of("elements", self.elements, tuple(SITES))
        check_one_of("compat", self.compat, (None, "official"))
        if self.num_elements != "auto":
            check_count("num_elements", self.num_elements, 1)
        check_layers(self.layers, self.num_hidden_layers)
        if self.element_layers:
            check_layers(self.element_layers, self.num_hidden_layers, name="element_layers")
        if self.attention_heads is not None:
            check_count("attention_heads", self.attention_heads, 1)
        check_strength(self.strength)
        needed = ["compat:official"] * (self.compat == "official") + ["elements:neurons"] * (
            self.elements == "neurons"
        )
        self.requires = sorted({*self.requires, *needed})

    def site(self, layer: int) -> Site:
        """Where the elements of a block are."""
        return Site(SITES[self.elements], layer)


class SADI(SteeringMethod[SADIConfig]):
    """`A <- A + strength * (A * M)` at the newest token, M the mask of the chosen elements.

    With `compat="official"`, `A <- strength * A_q` at the chosen elements of the query token only, A_q its unsteered
    activations; a run-time scale s goes that share of the way.

    Args:
        config: a fitted `SADIConfig`.
        tensors: `mask`, int64 `[element_layers, heads, neurons or hidden_size]`, 1 at the chosen elements and 0.

    Raises:
        AdapterFileError: if the config is not fitted, or the mask does not fit it.
    """

    def __init__(self, config: SADIConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        ((layers, width),) = self.tensor_shapes(config).values()
        mask = tensors.get("mask")
        fits = mask is not None and mask.ndim == 2 and len(mask) == layers and width in (NEURONS, mask.shape[1])
        if mask is None or not fits or not set(mask.unique().tolist()) <= {0, 1}:
            raise AdapterFileError(f"A SADI adapter needs the tensor 'mask' of zeros and ones, [{layers}, {width}].")
        self.maps = tuple(config.site(layer) for layer in config.element_layers)
        self._replaces = config.compat == "official"
        self.reads = self.maps if self._replaces else ()
        self.tensors = {str(site): row.bool() for site, row in zip(self.maps, mask, strict=True)}

    def decide(self, queries: QueryStates) -> Decision:
        """Keep the unsteered activations, `[rows, width]` per site, for `compat="official"`; nothing is added."""
        return Decision(vectors=dict(queries))

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Amplify the chosen elements of the selected tokens of `[rows, tokens, width]`; the others do not change."""
        mask = self.parameters_on(hidden.device)[str(site)]
        chosen = mask.repeat_interleave(hidden.shape[-1] // len(mask)) & (view.scale != 0)
        if view.mask is not None:
            chosen = chosen & view.mask[..., None]
        state = hidden.float()
        if not self._replaces:
            return torch.where(chosen, state * (1 + view.scale * self.strength), state).to(hidden.dtype)
        if view.decision is None:
            # A chunk of the prompt before the query.
            return hidden
        chosen = chosen & (view.since_query(hidden) == 0)[..., None]
        target = self.strength * view.decision.vectors[site][:, None].to(hidden.device)
        return torch.where(chosen, torch.lerp(state, target, view.scale), state).to(hidden.dtype)

    @classmethod
    def tensor_shapes(cls, config: SADIConfig) -> dict[str, Shape]:
        """One row per block with chosen elements.

        Raises:
            AdapterFileError: if the config is not fitted.
        """
        if config.elements == "head":
            require_fitted(config, "attention_heads")
        else:
            require_fitted(config)
        if not config.element_layers:
            raise AdapterFileError("The SADI config names no element_layers, so it is not fitted. Run `fit_steering`.")
        widths = {"head": config.attention_heads, "neurons": NEURONS, "hidden": config.hidden_size}
        return {"mask": Indices((len(config.element_layers), widths[config.elements]))}

    @classmethod
    def needs(cls, config: SADIConfig, info: ModelInfo) -> CaptureRequest:
        """The compared blocks, at the last token of each answer.

        Raises:
            ValueError: if a layer is out of range.
            UnsupportedModelError: if heads are requested and the model has none.
        """
        if config.elements == "head" and not info.num_heads:
            raise UnsupportedModelError("SADI with elements='head' amplifies attention heads; the model has none.")
        layers = _layers(config, info.num_layers)
        return CaptureRequest(tuple(config.site(layer) for layer in layers), ("answer_last",))

    @classmethod
    def fit(cls, data: FitData, config: SADIConfig) -> FitResult:
        """Find the masks on the `fit` and `calibration` parts, K and the strength on `validation`.

        Raises:
            DatasetError: for too few rows.
            UnsupportedModelError: if the blocks have feed-forwards of different widths.
        """
        layers = _layers(config, data.info.num_layers)
        heads = data.info.num_heads if config.elements == "head" else None
        parts: tuple[Part, ...] = ("fit", "calibration")
        if sum(len(data.prompts(part)) for part in parts) < MIN_ROWS:
            raise DatasetError(f"SADI needs at least {MIN_ROWS} rows to fit on; the paper uses about 150.")
        differences = [element_differences(data, config.site(layer), parts, heads) for layer in layers]
        if len({len(difference) for difference in differences}) > 1:
            raise UnsupportedModelError(
                "The blocks have feed-forwards of different widths; name blocks of one kind in `layers`."
            )
        found = np.stack(differences)
        counts: Sequence[int] = [count for count in COUNTS[config.elements] if count <= found.size] or [found.size]
        if not isinstance(config.num_elements, str):
            counts = [config.num_elements]
        masks = {count: largest(found, count) for count in counts}
        trials = {count: _trial(data, config, layers, mask) for count, mask in masks.items()}
        doses: Sequence[float] | None = None
        if config.compat == "official":
            # Factors of an element's own activation, which mean the same for every K.
            trials = {count: Trial.of_factor(trial.build) for count, trial in trials.items()}
            doses = STRENGTHS[config.elements]
        chosen = search(data, config.strength, trials, what="count", doses=doses)
        mask = masks[chosen.key]
        held_out = {layer: element_differences(data, config.site(layer), ("validation",), heads) for layer in layers}
        order = sorted(zip(*np.nonzero(mask), strict=True), key=lambda at: -found[at])
        report: dict[str, Any] = {
            "elements": [
                {
                    "layer": layers[row],
                    config.elements: int(column),
                    "difference": float(found[row, column]),
                    "held_out_difference": float(held_out[layers[row]][column]),
                }
                for row, column in order
            ],
            **chosen.report,
        }
        return FitResult(_config(config, data.info, layers, mask, chosen.strength), _tensors(mask), report)


def element_differences(data: FitData, site: Site, parts: tuple[Part, ...], heads: int | None) -> NDArray[np.float64]:
    """Mean over rows of the wanted answers' last states minus the unwanted ones'.

    Args:
        data: the states.
        site: where they are taken.
        parts: parts of the rows.
        heads: number of heads, to average over their dimensions; None for single dimensions or neurons.

    Returns:
        `[heads]` or `[width]`; zeros if there are no rows.
    """
    difference, (rows, _) = mean_difference(data, ("chosen", "rejected"), site, parts, "answer_last")
    if not rows:
        return np.zeros(heads or data.chosen(site, parts[0], "answer_last").shape[1])
    return difference if heads is None else difference.reshape(heads, -1).mean(axis=1)


def largest(differences: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """The mask of the largest entries (signed, as published), at most all; ties go to the earlier ones.

    Args:
        differences: `[layers, elements]`.
        count: K.
    """
    mask = np.zeros(differences.size, dtype=bool)
    mask[np.argsort(-differences, axis=None, kind="stable")[:count]] = True
    return mask.reshape(differences.shape)


def _config(
    config: SADIConfig, info: ModelInfo, layers: list[int], mask: NDArray[np.bool_], strength: float
) -> SADIConfig:
    kept = [layer for layer, row in zip(layers, mask, strict=True) if row.any()]
    heads = info.num_heads if config.elements == "head" else None
    count = int(mask.sum())
    return filled_in(config, info, strength=strength, num_elements=count, element_layers=kept, attention_heads=heads)


def _tensors(mask: NDArray[np.bool_]) -> dict[str, torch.Tensor]:
    return {"mask": torch.from_numpy(mask[mask.any(axis=1)].astype(np.int64))}


def _trial(data: FitData, config: SADIConfig, layers: list[int], mask: NDArray[np.bool_]) -> Trial:
    kept = [(layer, row) for layer, row in zip(layers, mask, strict=True) if row.any()]
    states = [data.chosen(config.site(layer), "fit", "answer_last") for layer, _ in kept]
    amplified = [
        state * np.repeat(row, state.shape[1] // len(row)) for state, (_, row) in zip(states, kept, strict=True)
    ]
    return Trial(
        build=lambda strength: SADI(_config(config, data.info, layers, mask, strength), _tensors(mask)),
        vector_norm=median_norm(np.concatenate(amplified, axis=1)),
        state_norm=median_norm(np.concatenate(states, axis=1)),
    )


def _layers(config: SADIConfig, num_layers: int) -> list[int]:
    if isinstance(config.layers, str):
        return list(range(num_layers))
    return [candidate_layers(layer, num_layers)[0] for layer in config.layers]


register_steering_method(SADI)
