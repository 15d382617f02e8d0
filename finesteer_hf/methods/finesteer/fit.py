"""Fits FineSteer: where, when, how and how strongly to steer, each chosen on held-out rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import expert_weights
from finesteer_hf.method_api import FitData, FitResult
from finesteer_hf.methods._shared.objective import Objective
from finesteer_hf.methods._shared.rows import json_ready
from finesteer_hf.methods._shared.screening import SCREEN_DOSE, rank_agreement
from finesteer_hf.methods._shared.search import (
    PROMPT_BLOCKS,
    compare,
    compare_two,
    compare_with_all,
    first_look,
    settle,
    shortlist,
)
from finesteer_hf.methods._shared.trials import RELATIVE_DOSES, SHORT_LIST, Trial, evenly, point_row
from finesteer_hf.methods.finesteer.candidates import CandidateFit, CandidateFits, Place, has_open_experts, of_rank
from finesteer_hf.methods.finesteer.config import FineSteerConfig
from finesteer_hf.methods.finesteer.experts import MIN_ROWS, ExpertFit, small_width
from finesteer_hf.methods.finesteer.layers import Sweep, sweep_layers, wants_gradients
from finesteer_hf.methods.finesteer.refine import AUTO_EPOCHS, refine
from finesteer_hf.processors import Positions


if TYPE_CHECKING:
    from finesteer_hf.methods.finesteer.method import FineSteer


# Ranks of the residual map to run steered, below the one that predicts the shifts best; 0 is a constant vector.
LOW_RANKS = (0, 1, 4, 8, 16)
# A tenth of fewer rows is too little to decide when to stop training.
MIN_ROWS_TO_TRAIN = 60
# Multiples of the place's best dose at which experts are tried.
NEAR_DOSES = (0.75, 1.0, 1.33)
# A candidate is run steered if its first-order gain is at least this share of the best; this many differences of
# states are.
SCREENED_GAIN, SCREENED = 0.25, 2


def fit_finesteer(data: FitData, config: FineSteerConfig, method_cls: type[FineSteer]) -> FitResult:
    """Fit gate, experts, place, target and strength.

    Places that separate the queries are ranked by the closed forms' R^2 and by first-order gain. The few best are run
    steered on held-out rows: differences of states at single blocks, gradients of the preference at the best block
    and at several. At the chosen place the fit tries maps of lower rank (the rank that predicts shifts best does not
    always steer best) and a small mixture trained as published; then the prompt's tokens instead of those from the
    query on, with closed forms and with gradients that are trained further; then the closed form trained further through
    the frozen model. The experts learn from the `fit` and `calibration` parts (see `fit_gate` for the gate's data);
    everything else is chosen on `validation`, by `Objective`.

    Raises:
        DatasetError: for too few rows, or a gate that needs general prompts when there are none.
    """
    rows = len(data.prompts("fit"))
    if rows < MIN_ROWS:
        raise DatasetError(
            f"FINESTEER needs at least {MIN_ROWS} rows to fit on, got {rows}; hundreds are recommended."
        )
    fits = CandidateFits(data, config, method_cls)
    positions: Positions = "generated" if config.positions == "auto" else config.positions
    sweep = sweep_layers(data, config)

    chosen, dose, tried, agreement = _choose_place(fits, sweep, positions)
    chosen, dose, experts_tried = _choose_experts(fits, chosen, dose)
    gradients = _gradients_in_prompt(fits, sweep)
    chosen, dose, prompt_tried = _try_prompts(fits, sweep, gradients, chosen, dose)
    chosen, dose, trained_prompt_tried = _try_trained_prompt(fits, gradients, chosen, dose)
    chosen, dose, refined_tried = _choose_refinement(fits, chosen, dose)
    chosen, dose, positions_tried = _choose_positions(fits, chosen, dose)

    steering = fits.trial(chosen)
    strength, settled = settle(data, config.strength, steering, dose)
    data.note(f"{chosen.place}, strength {strength:g}: {settled['strength']}")
    report = {
        "layer": chosen.place.writes[0].layer,
        "place": str(chosen.place),
        "layers": sweep.table,
        "layers_tried": tried,
        "prompt_tried": prompt_tried,
        "trained_prompt_tried": trained_prompt_tried,
        "screening_agrees": agreement,
        "experts_tried": experts_tried,
        "refinement_tried": refined_tried,
        "positions_tried": positions_tried,
        **settled,
        "vector": chosen.experts.judge(fits.rows(chosen.place, ("validation",))) | settled["vector"],
        "experts": chosen.experts.report,
        "expert_use": _expert_use(chosen.experts, data.query(chosen.place.read, "fit")),
        "gate": chosen.gate.report,
        "gate_scores": chosen.gate.scores,
        "baselines": _baselines(fits, chosen, strength / steering.strength_of(1.0)) if settled["objective"] else None,
    }
    tensors = {**chosen.gate.tensors, **chosen.experts.tensors}
    return FitResult(chosen.config(data.info, strength), tensors, json_ready(report))


def _choose_place(
    fits: CandidateFits, sweep: Sweep, positions: Positions
) -> tuple[CandidateFit, float | None, list[dict[str, Any]] | None, float | None]:
    """The place that steers best with the quickest experts, its best dose, the table, the screening's agreement."""
    data, config = fits.data, fits.config
    places = _gradient_places(fits, sweep)
    if config.target != "gradient":
        places += [fits.place([layer], "difference") for layer in sweep.by_fit[:SHORT_LIST]]
    quick = dataclasses.replace(config, experts="reduced_rank", num_experts="auto", residual_rank="auto")
    if len(places) == 1:
        return fits.fit(places[0], config, positions), None, None, None
    found = {
        str(place): fits.fit(place, quick if place.target == "difference" else of_rank(config, 0), positions)
        for place in places
    }
    gains: dict[str, float | None] = dict.fromkeys(found)
    if wants_gradients(config):
        gains = {name: fits.gain(fit) for name, fit in found.items()}
        differences = sorted(
            (name for name, fit in found.items() if fit.place.target == "difference"),
            key=lambda name: -(gains[name] or 0.0),
        )
        least = SCREENED_GAIN * max(gain or 0.0 for gain in gains.values())
        promising = [name for name in found if name not in differences[SCREENED:] and (gains[name] or 0.0) >= least]
        found = {name: found[name] for name in promising or found}
    trials = {name: fits.trial(fit) for name, fit in found.items()}
    name, dose, tried = compare(data, config.strength, trials, "place")
    agreement = None
    for row in tried or []:
        row["layer"] = found[row["place"]].place.writes[0].layer
        row["gain"] = gains[row["place"]]
    if tried and all(row["gain"] is not None for row in tried):
        agreement = rank_agreement([row["gain"] for row in tried], [row["preference"] for row in tried])
        tried += [{"place": name, "gain": gain} for name, gain in gains.items() if name not in found]
    place = found[name].place
    simple = place.target == "gradient" and (config.experts, config.residual_rank) == ("auto", "auto")
    return (found[name] if simple else fits.fit(place, config, positions)), dose, tried, agreement


def _gradient_places(fits: CandidateFits, sweep: Sweep) -> list[Place]:
    """The block of the highest first-order gain, and several together; none where gradients are not wanted."""
    if not wants_gradients(fits.config):
        return []
    places = [fits.place([layer], "gradient") for layer in sweep.by_gain[:1]]
    return places + ([fits.place(sweep.several, "gradient")] if sweep.several else [])


def _choose_experts(
    fits: CandidateFits, chosen: CandidateFit, dose: float | None
) -> tuple[CandidateFit, float | None, list[dict[str, Any]] | None]:
    """Maps of several ranks and a small trained mixture, compared with the best predictor of shifts there."""
    data, config, place = fits.data, fits.config, chosen.place
    if not has_open_experts(config):
        return chosen, dose, None
    candidates = {f"rank {chosen.experts.residual_rank}": chosen}
    if place.target == "gradient" or chosen.positions == "prompt":
        # The constant was chosen. Most of a gradient is specific to its row; only the part that the query predicts is
        # worth more than the constant.
        best = fits.fit(place, dataclasses.replace(config, experts="reduced_rank"), chosen.positions)
        candidates |= {f"rank {best.experts.residual_rank}": best}
    else:
        best_fitting = chosen.experts.residual_rank
        for rank in LOW_RANKS:
            if rank < best_fitting:
                candidates[f"rank {rank}"] = fits.fit(place, of_rank(config, rank), chosen.positions)
        if config.experts == "auto" and len(data.prompts("fit")) >= MIN_ROWS_TO_TRAIN:
            candidates |= _trained(fits, chosen)
    if len(candidates) == 1:
        return chosen, dose, None
    trials = {name: fits.trial(fit) for name, fit in candidates.items()}
    name, near, tried = compare(data, config.strength, trials, "experts", _near(dose))
    return candidates[name], near or dose, tried


def _trained(fits: CandidateFits, chosen: CandidateFit) -> dict[str, CandidateFit]:
    """The paper's mixture within the default size limit; nothing if the shifts form no clusters."""
    small = small_width(fits.data.info.hidden_size, chosen.gate.size)
    settings = dataclasses.replace(fits.config, experts="paper", key_dim=small, hidden_dim=small)
    try:
        return {"trained mixture": fits.fit(chosen.place, settings, chosen.positions)}
    except ValueError:
        return {}


def _gradients_in_prompt(fits: CandidateFits, sweep: Sweep) -> list[CandidateFit]:
    """Gradients in the prompt's tokens, constant if that is open; none where positions or strength are set."""
    if not fits.config.positions == fits.config.strength == "auto":
        return []
    settings = _constant_if_open(fits.config)
    return [fits.fit(place, settings, "prompt") for place in _gradient_places(fits, sweep)]


def _constant_if_open(config: FineSteerConfig) -> FineSteerConfig:
    return of_rank(config, 0) if has_open_experts(config) else config


def _try_prompts(
    fits: CandidateFits, sweep: Sweep, gradients: list[CandidateFit], chosen: CandidateFit, dose: float | None
) -> tuple[CandidateFit, float | None, list[dict[str, Any]] | None]:
    """Steer the prompt's tokens instead, if that is better by more than the standard error.

    What the model makes of a steered prompt it says in its own words, so a dose that would break its text from the query
    on leaves it fluent. First-order gains are those of vectors from the query on and say little of this: constant
    differences of states are run steered at some blocks, and constant gradients where they gain most.
    """
    config, data = fits.config, fits.data
    if not config.positions == config.strength == "auto":
        return chosen, dose, None
    late = fits.trial(chosen)
    dose = dose or compare(data, config.strength, {str(chosen.place): late}, "place")[1]
    if not dose:
        return chosen, dose, None
    found = {str(fit.place): fit for fit in gradients}
    if config.target != "gradient":
        settings = _constant_if_open(config)
        places = [fits.place([block], "difference") for block in evenly(sorted(sweep.by_fit), PROMPT_BLOCKS)]
        found |= {str(place): fits.fit(place, settings, "prompt") for place in places}
    trials = {name: fits.trial(fit) for name, fit in found.items()}
    best, screened = shortlist(data, config.strength, trials, "place")
    name, near, tried = compare(data, config.strength, best, "place")
    if not near:
        return chosen, dose, screened
    steered: dict[Positions, tuple[Trial, list[float]]] = {
        chosen.positions: (late, [dose]),
        "prompt": (best[name], [near]),
    }
    positions, better, against = compare_two(data, steered, "positions")
    table = [*screened, *(tried or []), *against]
    if positions != "prompt":
        return chosen, better, table
    experts, near, ranks = _choose_experts(fits, found[name], better)
    return experts, near, [*table, *(ranks or [])]


def _try_trained_prompt(
    fits: CandidateFits, gradients: list[CandidateFit], chosen: CandidateFit, dose: float | None
) -> tuple[CandidateFit, float | None, list[dict[str, Any]] | None]:
    """Steer the prompt's tokens with gradients that are trained further, if that is better by more than the standard error.

    A gradient is the best direction for a small step, and in the prompt the way to the answer is long: untrained it may
    do little where trained it does most.
    """
    config, data = fits.config, fits.data
    if not dose or not gradients or config.refine != "auto" or gradients[-1].experts.kind != "reduced_rank":
        return chosen, dose, None
    start = gradients[-1]
    near = compare(data, config.strength, {str(start.place): fits.trial(start)}, "place")[1]
    if not near:
        return chosen, dose, None
    trained = refine(fits, start, AUTO_EPOCHS, near)
    candidates = {
        "untrained": (fits.trial(chosen), [dose]),
        "trained": (fits.trial(trained), [near * f for f in NEAR_DOSES]),
    }
    name, better, table = compare_two(data, candidates, "experts")
    return (trained if name == "trained" else chosen), better, table


def _choose_refinement(
    fits: CandidateFits, chosen: CandidateFit, dose: float | None
) -> tuple[CandidateFit, float | None, list[dict[str, Any]] | None]:
    """The closed form trained further through the frozen model, if requested or better on held-out rows."""
    config, data = fits.config, fits.data
    if config.refine == 0 or chosen.refined or chosen.experts.kind != "reduced_rank":
        return chosen, dose, None
    if config.refine == "auto" and (chosen.place.target != "gradient" or not dose):
        return chosen, dose, None
    epochs = AUTO_EPOCHS if config.refine == "auto" else int(config.refine)
    refined = refine(fits, chosen, epochs, dose or SCREEN_DOSE)
    if config.refine != "auto":
        return refined, dose, None
    candidates = {"closed form": chosen, "refined": refined}
    trials = {name: fits.trial(fit) for name, fit in candidates.items()}
    name, near, tried = compare(data, config.strength, trials, "experts", _near(dose))
    return candidates[name], near or dose, tried


def _choose_positions(
    fits: CandidateFits, chosen: CandidateFit, dose: float | None
) -> tuple[CandidateFit, float | None, list[dict[str, Any]] | None]:
    """The chosen positions, unless `all` is better by more than the standard error."""
    config = fits.config
    if config.positions != "auto" or not dose or isinstance(config.strength, (int, float)):
        return chosen, dose, None
    others = dataclasses.replace(chosen, positions="all")
    trials = fits.trial(chosen), fits.trial(others)
    name, dose, table = compare_with_all(fits.data, chosen.positions, *trials, dose)
    return (others if name == "all" else chosen), dose, table


def _baselines(fits: CandidateFits, chosen: CandidateFit, dose: float) -> dict[str, dict[str, Any]]:
    """Figures of simpler vectors on held-out rows at the same dose, as baselines for the curve."""
    constant = fits.fit(chosen.place, of_rank(fits.config, 0), chosen.positions)
    others: dict[str, Trial] = {
        "constant": fits.trial(constant),
        "random direction": fits.trial(fits.random(constant)),
    }
    found = {}
    for name, trial in others.items():
        points = fits.data.dose_response(trial.build, (0.0, trial.strength_of(dose)), first_look(fits.data))
        found[name] = point_row(points[1], Objective.of(points, fits.data.limits))
    return found


def _near(dose: float | None) -> list[float]:
    """Doses at which candidates for the same place are compared."""
    return [near * dose for near in NEAR_DOSES] if dose else list(RELATIVE_DOSES)


def _expert_use(experts: ExpertFit, queries: np.ndarray) -> list[float] | None:
    """Mean routing weight of each expert over the rows; None without routing."""
    if "router.weight" not in experts.tensors:
        return None
    weights = expert_weights(
        torch.from_numpy(queries), experts.tensors["router.weight"], experts.tensors["router.bias"]
    )
    use: list[float] = weights.mean(dim=0).tolist()
    return use
