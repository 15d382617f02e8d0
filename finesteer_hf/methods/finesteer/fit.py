"""Fitting FineSteer: where to act, when, how, and how strongly, each chosen on rows that were held out of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import expert_weights
from finesteer_hf.methods.base import FitData, FitResult
from finesteer_hf.methods.finesteer.candidates import CandidateFit, CandidateFits, Place, of_rank
from finesteer_hf.methods.finesteer.config import FineSteerConfig
from finesteer_hf.methods.finesteer.experts import MIN_ROWS, ExpertFit, small_width
from finesteer_hf.methods.finesteer.layers import Sweep, sweep_layers, wants_gradients
from finesteer_hf.methods.finesteer.refine import AUTO_EPOCHS, refine
from finesteer_hf.methods.objective import Objective
from finesteer_hf.methods.rows import json_ready
from finesteer_hf.methods.screening import SCREEN_DOSE, rank_agreement
from finesteer_hf.methods.strength import explore
from finesteer_hf.methods.trials import RELATIVE_DOSES, SHORT_LIST, Trial, point_row, try_each
from finesteer_hf.processors import Positions


if TYPE_CHECKING:
    from finesteer_hf.methods.finesteer.method import FineSteer


# Ranks of the residual map that are tried steered, below the one that predicts the shifts best; 0 is a constant vector.
LOW_RANKS = (0, 1, 4, 8, 16)
# A tenth of fewer rows tells little of when to stop training.
MIN_ROWS_TO_TRAIN = 60
# Multiples of the dose that was best at the place, at which they are tried.
NEAR_DOSES = (0.75, 1.0, 1.33)
# Multiples of it from which the strength is chosen.
CURVE = (0.5, 0.75, 1.0, 1.33)
# A candidate is steered if its first-order gain is at least this share of the best; of differences of states, so many are.
SCREENED_GAIN, SCREENED = 0.25, 2
# A first look at candidates takes this share of the held-out prompts, if that leaves so many.
FIRST_LOOK, ENOUGH_PROMPTS = 0.5, 40


def fit_finesteer(data: FitData, config: FineSteerConfig, method_cls: type[FineSteer]) -> FitResult:
    """Fit gate, experts, place, target and strength.

    Places that tell the queries apart are ranked by what the closed forms predict and by what they gain to first order;
    the few best are run steered on held-out rows: differences of states at single blocks, gradients of the preference at
    the best block and at several. At the one that is taken, maps of lower rank are tried (the rank that predicts shifts
    best is not always the one that steers best), a small mixture trained as published, and the closed form trained on
    through the frozen model. The experts learn from the `fit` and `calibration` parts (`fit_gate` says what the gate
    learns from); everything else is chosen on `validation`, by `Objective`.

    Raises:
        DatasetError: for too few rows, or a gate that needs general prompts where there are none.
    """
    rows = len(data.prompts("fit"))
    if rows < MIN_ROWS:
        raise DatasetError(f"FINESTEER needs at least {MIN_ROWS} rows to fit on, got {rows}; hundreds are advised.")
    fits = CandidateFits(data, config, method_cls)
    positions: Positions = "generated" if config.positions == "auto" else config.positions
    sweep = sweep_layers(data, config)

    chosen, doses, tried, agreement = _choose_place(fits, sweep, positions)
    chosen, doses, experts_tried = _choose_experts(fits, chosen, doses)
    chosen, doses, refined_tried = _choose_refinement(fits, chosen, doses)
    chosen, doses, positions_tried = _choose_positions(fits, chosen, doses)

    steering = fits.trial(chosen)
    if isinstance(config.strength, str) and doses:
        strength, curve, why = steering.choose_strength(config.strength, data, [doses[1] * near for near in CURVE])
    else:
        strength, curve, why = steering.choose_strength(config.strength, data)
    data.note(f"{chosen.place}, strength {strength:g}: {why}")
    report = {
        "layer": chosen.place.writes[0].layer,
        "place": str(chosen.place),
        "layers": sweep.table,
        "layers_tried": tried,
        "screening_agrees": agreement,
        "experts_tried": experts_tried,
        "refinement_tried": refined_tried,
        "positions_tried": positions_tried,
        "vector": chosen.experts.judge(fits.rows(chosen.place, ("validation",)))
        | {"vector_norm": steering.vector_norm, "state_norm": steering.state_norm},
        "experts": chosen.experts.report,
        "expert_use": _expert_use(chosen.experts, data.query(chosen.place.read, "fit")),
        "gate": chosen.gate.report,
        "gate_scores": chosen.gate.scores,
        "strength": why,
        "objective": Objective.of(curve, data.limits).to_dict() if curve else None,
        "baselines": _baselines(fits, chosen, strength / steering.strength_of(1.0)) if curve else None,
        "dose_response": [dataclasses.asdict(point) for point in curve],
    }
    tensors = {**chosen.gate.tensors, **chosen.experts.tensors}
    return FitResult(chosen.config(data.info, strength), tensors, json_ready(report))


def _choose_place(
    fits: CandidateFits, sweep: Sweep, positions: Positions
) -> tuple[CandidateFit, list[float] | None, list[dict[str, Any]] | None, float | None]:
    """The place that steers best with the quickest experts; the doses near its best; the table; how screening agreed."""
    data, config = fits.data, fits.config
    places: list[Place] = []
    if wants_gradients(config):
        places += [fits.place([layer], "gradient") for layer in sweep.by_gain[:1]]
        places += [fits.place(sweep.several, "gradient")] if sweep.several else []
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
    name, tried = try_each(data, trials, config.strength, what="place", share=_first_look(data))
    agreement = None
    for row in tried or []:
        row["layer"] = found[row["place"]].place.writes[0].layer
        row["gain"] = gains[row["place"]]
    if tried and all(row["gain"] is not None for row in tried):
        agreement = rank_agreement([row["gain"] for row in tried], [row["preference"] for row in tried])
        tried += [{"place": name, "gain": gain} for name, gain in gains.items() if name not in found]
    place = found[name].place
    doses = _doses_near(tried, "place", name, trials[name])
    simple = place.target == "gradient" and (config.experts, config.residual_rank) == ("auto", "auto")
    return (found[name] if simple else fits.fit(place, config, positions)), doses, tried, agreement


def _choose_experts(
    fits: CandidateFits, chosen: CandidateFit, doses: list[float] | None
) -> tuple[CandidateFit, list[float] | None, list[dict[str, Any]] | None]:
    """Maps of several ranks and a small trained mixture beside what predicts the shifts best, at the same place."""
    data, config, place = fits.data, fits.config, chosen.place
    open_choice = (config.num_experts, config.residual_rank) == ("auto", "auto")
    if config.experts not in ("auto", "reduced_rank") or not open_choice:
        return chosen, doses, None
    candidates = {f"rank {chosen.experts.residual_rank}": chosen}
    if place.target == "gradient":
        # Most of a gradient is its row's own; only what the query foretells of it is worth more than the constant.
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
        return chosen, doses, None
    trials = {name: fits.trial(fit) for name, fit in candidates.items()}
    name, tried = try_each(
        data, trials, config.strength, what="experts", doses=doses or RELATIVE_DOSES, share=_first_look(data)
    )
    return candidates[name], _doses_near(tried, "experts", name, trials[name]) or doses, tried


def _trained(fits: CandidateFits, chosen: CandidateFit) -> dict[str, CandidateFit]:
    """The paper's mixture at a size that an adapter may take by default; nothing where the shifts form no clusters."""
    small = small_width(fits.data.info.hidden_size, chosen.gate.size)
    settings = dataclasses.replace(fits.config, experts="paper", key_dim=small, hidden_dim=small)
    try:
        return {"trained mixture": fits.fit(chosen.place, settings, chosen.positions)}
    except ValueError:
        return {}


def _choose_refinement(
    fits: CandidateFits, chosen: CandidateFit, doses: list[float] | None
) -> tuple[CandidateFit, list[float] | None, list[dict[str, Any]] | None]:
    """The closed form trained on through the frozen model, where that is asked for or steers held-out rows better."""
    config, data = fits.config, fits.data
    if config.refine == 0 or chosen.experts.kind != "reduced_rank":
        return chosen, doses, None
    if config.refine == "auto" and (chosen.place.target != "gradient" or not doses):
        return chosen, doses, None
    epochs = AUTO_EPOCHS if config.refine == "auto" else int(config.refine)
    refined = refine(fits, chosen, epochs, doses[1] if doses else SCREEN_DOSE)
    if config.refine != "auto":
        return refined, doses, None
    candidates = {"closed form": chosen, "refined": refined}
    trials = {name: fits.trial(fit) for name, fit in candidates.items()}
    name, tried = try_each(
        data, trials, config.strength, what="experts", doses=doses or RELATIVE_DOSES, share=_first_look(data)
    )
    return candidates[name], _doses_near(tried, "experts", name, trials[name]) or doses, tried


def _choose_positions(
    fits: CandidateFits, chosen: CandidateFit, doses: list[float] | None
) -> tuple[CandidateFit, list[float] | None, list[dict[str, Any]] | None]:
    """`generated`, unless `all` is better by more than the standard error; level results need no second pass."""
    config, data = fits.config, fits.data
    if config.positions != "auto" or not doses or isinstance(config.strength, (int, float)):
        return chosen, doses, None
    others = dataclasses.replace(chosen, positions="all")
    found, points = {}, []
    for name, fit in (("generated", chosen), ("all", others)):
        trial = fits.trial(fit)
        strengths = [trial.strength_of(dose) for dose in (doses[1:2] if fit is chosen else doses[:2])]
        found[name] = (fit, trial, explore(data, trial.build, strengths, _first_look(data)))
        points += found[name][2]
    objective = Objective.of(points, data.limits)
    best = {name: max(curve[1:], key=objective.merit) for name, (_, _, curve) in found.items()}
    table = [{"positions": name, **point_row(point, objective)} for name, point in best.items()]
    margin = best["all"].bottleneck_rise_se if objective.criterion == "sayable" else best["all"].preference_rise_se
    better = objective.value(best["all"]) - objective.value(best["generated"]) > margin
    name = "all" if better and not objective.broken(best["all"]) else "generated"
    fit, trial, _ = found[name]
    return fit, _doses_near(table, "positions", name, trial), table


def _baselines(fits: CandidateFits, chosen: CandidateFit, dose: float) -> dict[str, dict[str, Any]]:
    """What simpler vectors reach on held-out rows at the same dose, to hold the curve against."""
    constant = fits.fit(chosen.place, of_rank(fits.config, 0), chosen.positions)
    others: dict[str, Trial] = {
        "constant": fits.trial(constant),
        "random direction": fits.trial(fits.random(constant)),
    }
    found = {}
    for name, trial in others.items():
        points = fits.data.dose_response(trial.build, (0.0, trial.strength_of(dose)), _first_look(fits.data))
        found[name] = point_row(points[1], Objective.of(points, fits.data.limits))
    return found


def _doses_near(tried: list[dict[str, Any]] | None, what: str, name: str, trial: Trial) -> list[float] | None:
    """Doses around the one that was best for a candidate; None if nothing was tried."""
    if tried is None:
        return None
    strength = next(row["strength"] for row in tried if row[what] == name)
    return [near * strength / trial.strength_of(1.0) for near in NEAR_DOSES]


def _first_look(data: FitData) -> float:
    return FIRST_LOOK if len(np.unique(data.prompts("validation"))) * FIRST_LOOK >= ENOUGH_PROMPTS else 1.0


def _expert_use(experts: ExpertFit, queries: np.ndarray) -> list[float] | None:
    """Mean routing weight of each expert over the rows; None without routing."""
    if "router.weight" not in experts.tensors:
        return None
    weights = expert_weights(
        torch.from_numpy(queries), experts.tensors["router.weight"], experts.tensors["router.bias"]
    )
    use: list[float] = weights.mean(dim=0).tolist()
    return use
