"""A constant vector at a block's output, trained on preferences: shared by REPS and BIPO.

A method is a config and a loss. The loss is a function of the answers' log-probabilities under the vector; see
`preference_training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.method_api import CaptureRequest, FitData, FitResult, ModelInfo, SteeringMethod
from finesteer_hf.methods._shared.checks import (
    check_count,
    check_layer,
    check_number,
    check_one_of,
    check_strength,
    filled_in,
    require_fitted,
)
from finesteer_hf.methods._shared.moments import median_query_norm
from finesteer_hf.methods._shared.preference_training import (
    History,
    PreferenceRows,
    Training,
    cap_norm,
    first_order,
    train,
)
from finesteer_hf.methods._shared.search import search, shortlist
from finesteer_hf.methods._shared.trials import Trial, candidate_layers
from finesteer_hf.processors import Decision, Positions, QueryStates, SteeringProcessor
from finesteer_hf.sites import Site, resid_post


MIN_ROWS = 2
# Blocks to train at with layer="auto": one training costs ten times as much as a first look at all blocks.
TRAINED_LAYERS = 2
# For learning_rate="auto": norm of the vector if all steps went one way, in units of the state's. They do not: on the
# playground REPS ends at a fifth of it or less. At 1 its held-out loss is still falling when the steps end.
REACH = 3.0
KEEPS = ("best", "last")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(kw_only=True)
class PreferenceVectorConfig(SteeringConfig):
    """Settings of a vector trained on preferences.

    Attributes:
        layer: decoder block whose output is steered; `auto` trains at the two where the loss's first gradient, added as
            a vector, does most for held-out answers, and takes the better one.
        num_rows: training rows, drawn with the seed; None for all.
        epochs: passes over the rows.
        batch_size: rows a step.
        learning_rate: AdamW's rate, in units of the state's coordinates; with `auto` all steps in one direction would
            reach three times the state's norm, in any model.
        weight_decay: AdamW's.
        schedule: how the rate falls: `constant`, `linear` or `cosine`.
        warmup_steps: steps over which the rate rises first.
        clip: largest norm of the gradient; None does not clip.
        norm_cap: largest norm of the vector in training, as a share of the state's; None for no limit.
        keep: `best` keeps the epoch whose loss on rows of the `calibration` part is lowest, `last` the last.
    """

    # Both papers steer every token of prompt and answer.
    positions: Positions = field(default="all", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Lambda: a number, auto, kl:<nats> or norm:<share>.")
    )
    layer: int | str = field(default="auto", metadata=setting("Steered decoder block, or auto."))
    num_rows: int | None = field(default=128, metadata=setting("Training rows."))
    epochs: int = field(default=5, metadata=setting("Passes over the rows."))
    batch_size: int = field(default=8, metadata=setting("Rows per step."))
    learning_rate: float | str = field(default="auto", metadata=setting("Learning rate of AdamW, or auto."))
    weight_decay: float = field(default=0.0, metadata=setting("Weight decay of AdamW."))
    schedule: Literal["constant", "linear", "cosine"] = field(
        default="linear", metadata=setting("How the learning rate falls: constant, linear or cosine.")
    )
    warmup_steps: int = field(default=0, metadata=setting("Steps over which the learning rate rises."))
    clip: float | None = field(default=None, metadata=setting("Largest norm of the gradient."))
    norm_cap: float | None = field(default=None, metadata=setting("Largest norm, as a share of the state's."))
    keep: Literal["best", "last"] = field(default="best", metadata=setting("Which epoch's vector: best or last."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer, self.num_hidden_layers)
        check_strength(self.strength)
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_steps", 0)):
            check_count(name, getattr(self, name), least)
        if self.num_rows is not None:
            check_count("num_rows", self.num_rows, MIN_ROWS)
        if self.learning_rate != "auto":
            check_number("learning_rate", self.learning_rate, above=0)
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}.")
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_one_of("keep", self.keep, KEEPS)
        for name in ("clip", "norm_cap"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)

    @property
    def unit(self) -> float:
        """The factor in training that corresponds to strength 1."""
        return 1.0


PreferenceConfigT = TypeVar("PreferenceConfigT", bound=PreferenceVectorConfig)


class PreferenceVector(SteeringMethod[PreferenceConfigT]):
    """`H <- H + strength * v` at the output of one block, for every query.

    A subclass defines the loss.

    Args:
        config: a fitted config.
        tensors: `vector`, `[hidden_size]` float32.

    Raises:
        AdapterFileError: if the config is not fitted, or there is no vector.
    """

    def __init__(self, config: PreferenceConfigT, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        require_fitted(config, "layer")
        if "vector" not in tensors:
            raise AdapterFileError(f"The {config.steering_type} adapter lacks the tensor 'vector'.")
        self.site = resid_post(config.layer)
        self.writes = (self.site,)

    def decide(self, queries: QueryStates) -> Decision:
        """The vector, `[1, hidden_size]`."""
        return Decision(vectors={self.site: self.parameters_on(queries.device)["vector"][None]})

    # -- what a subclass defines --------------------------------------------------------------------------------------

    @classmethod
    def first_losses(
        cls, rows: PreferenceRows, which: Sequence[int], steering: SteeringProcessor, config: PreferenceConfigT
    ) -> torch.Tensor:
        """Losses `[rows]` under a processor that adds vectors; their slope at zero ranks the blocks."""
        raise NotImplementedError

    @classmethod
    def losses(
        cls,
        rows: PreferenceRows,
        which: Sequence[int],
        site: Site,
        vector: torch.Tensor,
        config: PreferenceConfigT,
        rng: np.random.Generator | None,
    ) -> torch.Tensor:
        """Losses of some rows, `[rows]`.

        Args:
            rows: training or held-out rows.
            which: positions of some of the rows.
            site: where the vector is added.
            vector: `[hidden_size]` float32.
            config: the config.
            rng: generator for a step's draws; None uses their average.
        """
        raise NotImplementedError

    @classmethod
    def start(cls, width: int, learning_rate: float, rng: np.random.Generator) -> torch.Tensor:
        """The vector before the first step, `[width]` float32."""
        return torch.zeros(width)

    # -- the fit ------------------------------------------------------------------------------------------------------

    @classmethod
    def tensor_shapes(cls, config: PreferenceConfigT) -> dict[str, tuple[int | None, ...]]:
        """One vector of the residual stream.

        Raises:
            AdapterFileError: if the config is not fitted.
        """
        require_fitted(config, "layer")
        return {"vector": (config.hidden_size,)}

    @classmethod
    def needs(cls, config: PreferenceConfigT, info: ModelInfo) -> CaptureRequest:
        """The outputs of the candidate layers, for the size of their states.

        Raises:
            ValueError: if the layer is out of range.
        """
        layers = candidate_layers(config.layer, info.num_layers)
        return CaptureRequest(tuple(map(resid_post, layers)), ("query",))

    @classmethod
    def fit(cls, data: FitData, config: PreferenceConfigT) -> FitResult:
        """Train on `fit`, stop by `calibration`, choose layer and strength on `validation`.

        Raises:
            DatasetError: for too few rows; if the loss does not depend on the vector, or training does not lower it.
        """
        name = config.steering_type
        if (found := len(data.prompts("fit"))) < MIN_ROWS:
            raise DatasetError(f"{name} needs at least {MIN_ROWS} rows to fit on, got {found}.")
        rows = PreferenceRows.draw(data, "fit", config.num_rows)
        held_out = PreferenceRows.draw(data, "calibration", config.num_rows)
        sites = [resid_post(layer) for layer in candidate_layers(config.layer, data.info.num_layers)]
        norms, screened = {site: median_query_norm(data, site) for site in sites}, None
        if len(sites) > TRAINED_LAYERS:
            sites, screened = cls._promising(data, rows, norms, config)
        vectors, histories = {}, {}
        for site in sites:
            data.note(f"{name}: training a vector at layer {site.layer}")
            vector, history = cls._trained(data, rows, held_out, site, norms[site], config)
            histories[site.layer] = history
            if history.kept and vector.any():
                vectors[site.layer] = vector
        if not vectors:
            raise DatasetError(
                f"No vector at the layers {[site.layer for site in sites]} lowers {name}'s loss on held-out rows below "
                "the unsteered one. Give more rows (num_rows), another learning_rate or another layer, or keep='last'."
            )

        trials = {
            layer: cls._trial(data, config, layer, vector, norms[resid_post(layer)])
            for layer, vector in vectors.items()
        }
        chosen = search(data, config.strength, trials)
        layer = chosen.key
        fitted = filled_in(config, data.info, layer=layer, strength=chosen.strength)
        report: dict[str, Any] = {
            "layer": layer,
            "training": {"rows": len(rows), "held_out_rows": len(held_out), **histories[layer].report()},
            **chosen.report,
            "layers_screened": screened,
        }
        return FitResult(fitted, {"vector": vectors[layer]}, report)

    @classmethod
    def _promising(
        cls,
        data: FitData,
        rows: PreferenceRows,
        norms: Mapping[Site, float],
        config: PreferenceConfigT,
    ) -> tuple[list[Site], list[dict[str, Any]]]:
        """The sites to train at, and the table of all.

        The gradients are tried as vectors. Their lengths, the gains of tiny ones, favour late blocks: where the prompt is
        steered too, what an early block gains begins slowly.
        """
        slopes = first_order(
            lambda which, steering: cls.first_losses(rows, which, steering, config),
            len(rows),
            dict.fromkeys(norms, data.info.hidden_size),
            config.positions,
        )
        trials = {
            site.layer: cls._trial(data, config, site.layer, -slope, norms[site])
            for site, slope in slopes.items()
            if slope.any()
        }
        # A given strength is one of trained vectors, which are longer.
        best, table = shortlist(data, "auto", trials, "layer")
        return [resid_post(layer) for layer in list(best)[:TRAINED_LAYERS]], table

    @classmethod
    def _trial(
        cls, data: FitData, config: PreferenceConfigT, layer: int, vector: torch.Tensor, state_norm: float
    ) -> Trial:
        """A vector at a block, with open strength."""

        def build(strength: float) -> SteeringProcessor:
            return cls(filled_in(config, data.info, layer=layer, strength=strength), {"vector": vector})

        return Trial(build, float(vector.norm()), state_norm)

    @classmethod
    def _trained(
        cls,
        data: FitData,
        rows: PreferenceRows,
        held_out: PreferenceRows,
        site: Site,
        state_norm: float,
        config: PreferenceConfigT,
    ) -> tuple[torch.Tensor, History]:
        """The vector at a site, `[hidden_size]` float32, and how its training went."""
        width = data.info.hidden_size
        training = Training(
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=1.0,
            weight_decay=config.weight_decay,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            clip=config.clip,
        )
        rate = config.learning_rate
        if isinstance(rate, str):
            # Adam moves each coordinate by about the rate.
            steps = training.steps(len(rows)) * (1.0 if config.schedule == "constant" else 0.5)
            rate = REACH * state_norm / (config.unit * width**0.5 * steps)
        vector = cls.start(width, rate, np.random.default_rng(data.seed)).requires_grad_(True)

        def judge() -> float | None:
            if config.keep == "last" or not len(held_out):
                return None
            every = range(len(held_out))
            return float(cls.losses(held_out, every, site, vector.detach(), config, None).mean())

        def cap() -> None:
            if config.norm_cap is not None:
                cap_norm(vector, config.norm_cap * state_norm / config.unit)

        history = train(
            [vector],
            lambda which, rng: cls.losses(rows, which, site, vector, config, rng),
            len(rows),
            dataclasses.replace(training, learning_rate=rate),
            seed=data.seed,
            judge=judge,
            after_step=cap,
            note=data.note,
        )
        return vector.detach() * config.unit, history
