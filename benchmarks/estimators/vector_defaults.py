"""Where the defaults came from: every way to fit vectors, and the default gate beside the paper's, on held-out rows.

Each seed draws the halves; all candidates see the same half and are judged on the other. Differences to the paper's
mixture are paired by seed. "Told" means that rows of one subject (six questions) or of one request (its wrappers) are
held out together within the fit, as `split="group"` does it. "Default" is the closed form of the best held-out R2, from
which a fit then takes a lower rank if that steers held-out rows better. Last, MC1 and MC2 of the playground's questions
under each vector, always on, at the best of the same strengths: one split, for vectors that predict well need not steer
well.

    python -m benchmarks.estimators.vector_defaults --truthfulqa TruthfulQA.csv --out benchmarks/results/vector_defaults.md
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from finesteer_hf import FineSteerConfig, SteeredModelForCausalLM, SteeringAdapter, playground
from finesteer_hf.estimators import (
    AutoScore,
    ConformalGate,
    IntervenedSubspace,
    MixtureSteering,
    PaperMoSE,
    QuantileGate,
    ReducedRankSteering,
    held_out_r2,
)
from finesteer_hf.evaluation.data.playground_eval import draw
from finesteer_hf.evaluation.data.truthfulqa import load_truthfulqa
from finesteer_hf.evaluation.data.truthfulqa import preference_rows as truthfulqa_rows
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem, score_choices
from finesteer_hf.evaluation.measures.statistics import mean_with_interval, paired_difference
from finesteer_hf.fitting.capture.jobs import make_jobs
from finesteer_hf.fitting.capture.reader import StateReader
from finesteer_hf.fitting.data.encoding import encode_preferences, encode_prompts
from finesteer_hf.fitting.data.rows import read_preferences, read_prompts
from finesteer_hf.method_api import CaptureRequest
from finesteer_hf.methods.finesteer.experts import highest_rank
from finesteer_hf.methods.finesteer.tensors import EXPERT_TENSORS, to_file
from finesteer_hf.sites import Site


PAPER, DEFAULT = "paper MoSE", "default"
TOLD = ", told what rows share"
STRENGTHS = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0)
EPSILON = 0.05


@dataclass(frozen=True)
class Rows:
    """Query states and shifts, `[rows, width]`, with the row that each belongs to."""

    queries: np.ndarray
    shifts: np.ndarray
    index: dict[str, int]

    def take(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        kept = [self.index[i] for i in ids]
        return self.queries[kept], self.shifts[kept]


def read(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], layer: int) -> Rows:
    """Read states of preference rows after a block."""
    site = Site("resid_post", layer)
    encoded = encode_preferences(tokenizer, read_preferences(rows).rows).rows
    reader, found = StateReader(model, CaptureRequest((site,))), {}
    for batch in reader.read(make_jobs(encoded)):
        found |= dict(zip(batch.prompts, batch.states[site, "query"], strict=True))
        found |= dict(zip(batch.answers, batch.states[site, "answer_mean"], strict=True))
    return Rows(
        np.stack([found[row.prompt] for row in encoded]).astype(np.float64),
        np.stack([found[row.chosen] - found[row.rejected] for row in encoded]).astype(np.float64),
        {row["id"]: number for number, row in enumerate(rows)},
    )


def read_general(model: Any, tokenizer: Any, layer: int) -> np.ndarray:
    site = Site("resid_post", layer)
    passages = encode_prompts(tokenizer, read_prompts(playground.general_rows("all")).rows)
    reader = StateReader(model, CaptureRequest((site,), ("query",)))
    jobs = make_jobs([], passages)
    return np.concatenate([batch.states[site, "query"] for batch in reader.read(jobs)])


def candidates(width: int, rows: int, seed: int) -> dict[str, tuple[str, Any]]:
    """Name -> kind of tensors and estimator, unfitted."""
    most = highest_rank(width, 4, 0)
    return {
        PAPER: ("paper", PaperMoSE(seed=seed)),
        "orthogonal residual (the paper's second)": ("paper", PaperMoSE(variant="orthogonal", seed=seed)),
        "ridge (full rank)": ("reduced_rank", ReducedRankSteering(min(width, rows - 1), calibrate=False, seed=seed)),
        "reduced rank": ("reduced_rank", ReducedRankSteering(max_rank=most, seed=seed)),
        "mixture of 4 (K of the published code)": ("mixture", MixtureSteering(4, max_rank=most, seed=seed)),
        DEFAULT: ("mixture", MixtureSteering(max_rank=most, seed=seed)),
        PAPER + TOLD: ("paper", PaperMoSE(seed=seed)),
        DEFAULT + TOLD: ("mixture", MixtureSteering(max_rank=most, seed=seed)),
    }


def shared() -> dict[str, str]:
    """By a playground row's id what it has in common with others: its subject, or its bare request."""
    world = playground.world()
    return {q.id: f"{q.kind}/{q.subject}" for q in world.questions} | {item.id: item.base for item in world.harmful}


Splitter = Callable[[int], tuple[list[str], list[str]]]


def tasks(model: Any, tokenizer: Any, layer: int, truthfulqa: Path | None) -> Iterator[tuple[str, Rows, Splitter]]:
    """Name, rows, and what draws the ids of the halves."""

    def halves(task: Any, split: Any) -> Splitter:
        def split_by(seed: int) -> tuple[list[str], list[str]]:
            fit, test = (
                [row["id"] for row in playground.preference_rows(task, half, split, seed)]
                for half in ("fit", "test")  # type: ignore[arg-type]
            )
            return fit, test

        return split_by

    truthful = read(model, tokenizer, playground.preference_rows("truthful", "all"), layer)
    yield "truthful, new questions", truthful, halves("truthful", "question")
    yield "truthful, new subjects", truthful, halves("truthful", "subject")
    safety = read(model, tokenizer, playground.preference_rows("safety", "all"), layer)
    yield "safety, new requests", safety, halves("safety", "question")
    if truthfulqa is not None:
        found = read(model, tokenizer, truthfulqa_rows(load_truthfulqa(truthfulqa)), layer)

        def split_questions(seed: int) -> tuple[list[str], list[str]]:
            fit, test = train_test_split(list(found.index), test_size=0.5, random_state=seed)
            return fit, test

        yield "TruthfulQA's text", found, split_questions


def show(values: Sequence[float]) -> str:
    found = mean_with_interval(values)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def percent(values: Sequence[float]) -> str:
    if len(set(values)) == 1:
        return f"{100 * values[0]:.1f}% in every split"
    found = mean_with_interval(values)
    return f"{100 * found.value:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def vectors_of_task(name: str, rows: Rows, split: Splitter, seeds: int) -> list[str]:
    r2: dict[str, list[float]] = defaultdict(list)
    chosen, common = [], shared()
    for seed in range(seeds):
        fit, test = split(seed)
        (queries, shifts), (new, wanted) = rows.take(fit), rows.take(test)
        constant = np.broadcast_to(shifts.mean(0), wanted.shape)
        for candidate, (_, estimator) in candidates(queries.shape[1], len(queries), seed).items():
            if TOLD in candidate and fit[0] not in common:
                continue
            estimator.fit(queries, shifts, [common[i] for i in fit] if TOLD in candidate else None)
            r2[candidate].append(held_out_r2(wanted, estimator.predict(new), constant))
            if candidate == DEFAULT:
                chosen.append(f"K={estimator.num_experts_} r={estimator.residual_rank_}")
    lines = [f"| {name}, {len(fit)} / {len(test)} | | | |"]
    for candidate, values in r2.items():
        gain = paired_difference(r2[PAPER], values)
        difference = "" if candidate == PAPER else f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        worse = (
            "" if candidate == PAPER else f"{sum(a < b for a, b in zip(values, r2[PAPER], strict=True))} of {seeds}"
        )
        lines.append(f"| - {candidate} | {show(values)} | {difference} | {worse} |")
    return [*lines, f"| - (the default took {', '.join(sorted(set(chosen)))}) | | | |"]


def gates_of_task(name: str, rows: Rows, split: Splitter, general: np.ndarray, rank: int, seeds: int) -> str:
    """Paper: quantile gate at 10% on the energy ratio, in sample. Default: chosen score, conformal at 5%."""
    found: dict[str, list[float]] = defaultdict(list)
    for seed in range(seeds):
        fit, test = split(seed)
        ours, new = rows.take(fit)[0], rows.take(test)[0]
        known, others = train_test_split(general, test_size=0.5, random_state=seed)
        paper: Any = IntervenedSubspace(rank).fit(ours)
        gate: Any = QuantileGate(0.1).fit(paper.score_samples(ours))
        found["paper misses"].append(float((gate.gate(paper.score_samples(new)) < 1).mean()))
        found["paper alarms"].append(float((gate.gate(paper.score_samples(others)) >= 0.5).mean()))
        learn, calibrate = train_test_split(ours, test_size=0.25, random_state=seed)
        score = AutoScore(seed=seed).fit(learn, known)
        gate = ConformalGate(EPSILON).fit(score.score_samples(calibrate))
        found["misses"].append(float((gate.gate(score.score_samples(new)) < 1).mean()))
        found["alarms"].append(float((gate.gate(score.score_samples(others)) >= 0.5).mean()))
    cells = [percent(found[key]) for key in ("paper misses", "misses", "paper alarms", "alarms")]
    return f"| {name} | {' | '.join(cells)} |"


def choices(rows: Rows, split: Splitter, layer: int, items: int) -> list[str]:
    """MC1 and MC2 under each vector, always on, at its best strength."""
    base, tokenizer = playground.load()
    model = SteeredModelForCausalLM.from_model(base)
    fit, test = split(0)
    questions = {question.id: question for question in playground.world().questions}
    asked = [
        ChoiceItem([{"role": "user", "content": q.prompt}], tuple(q.true), tuple(q.false))
        for q in (questions[i] for i in draw(test, items, 0))
    ]
    queries, shifts = rows.take(fit)
    width, plain = queries.shape[1], score_choices(model, tokenizer, asked)
    common = [shared()[i] for i in fit]
    lines = [f"| unsteered | | {plain.mc1.mean():.3f} | {show(plain.mc2)} | |"]
    constant = ReducedRankSteering(0)
    found: dict[str, Any] = {}
    for name, (kind, estimator) in {
        "constant mean shift": ("reduced_rank", constant),
        **candidates(width, len(queries), 0),
    }.items():
        estimator.fit(queries, shifts, common if TOLD in name else None)
        rank = getattr(
            estimator, "rank_", getattr(estimator, "residual_rank_", getattr(estimator, "residual_rank", 0))
        )
        site = str(Site("resid_post", layer))
        config = FineSteerConfig(
            layer=layer, gate="always", read_site=site, write_site=site, experts=kind, strength=1.0,
            positions="all", num_experts=getattr(estimator, "num_experts_", 1), residual_rank=rank, hidden_size=width,
        )  # fmt: skip
        adapter = SteeringAdapter(config, to_file(EXPERT_TENSORS[kind], estimator.state()))
        model.load_steering(adapter, adapter_name=f"a{len(found)}")
        scores = {}
        for strength in STRENGTHS:
            with model.steering(f"a{len(found)}", scale=strength):
                scores[strength] = score_choices(model, tokenizer, asked)
        best = max(scores, key=lambda strength: scores[strength].mc2.mean())
        found[name] = scores[best]
        gain = paired_difference(found.get(PAPER, scores[best]).mc2, scores[best].mc2)
        difference = (
            f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" if PAPER in found and name != PAPER else ""
        )
        lines.append(
            f"| {name} | {best:g} | {scores[best].mc1.mean():.3f} | {show(scores[best].mc2)} | {difference} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32, help="of the paper's subspace; its 128 is this model's width")
    parser.add_argument("--items", type=int, default=200, help="questions of MC1 and MC2")
    parser.add_argument("--truthfulqa", type=Path, default=None, help="TruthfulQA.csv, read by the playground's model")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the paper's rank is above what we advise
    model, tokenizer = playground.load()
    general = read_general(model, tokenizer, args.layer)
    every = list(tasks(model, tokenizer, args.layer, args.truthfulqa))
    text = [
        f"The playground's model, block {args.layer}, {args.seeds} seeds; mean over seeds [95% interval].",
        "",
        "| task (rows to fit / to test), vectors | held-out R2 against the constant | minus the paper's | worse than it |",
        "| --- | --- | --- | --- |",
        *(line for name, rows, split in every for line in vectors_of_task(name, rows, split, args.seeds)),
        "",
        f"Gates on the same halves: the paper's (quantile at 10%, energy ratio of rank {args.rank}, in sample) and the "
        f"default (chosen score, conformal at {EPSILON:.0%}). Half of the playground's general prompts are learned from.",
        "",
        "| task | misses: paper | misses: default | false alarms: paper | false alarms: default |",
        "| --- | --- | --- | --- | --- |",
        *(gates_of_task(name, rows, split, general, args.rank, args.seeds) for name, rows, split in every),
        "",
        f"MC1 and MC2 of {args.items} held-out questions (truthful, new subjects; one split), gate always open, each "
        f"vector at the strength of {', '.join(f'{s:g}' for s in STRENGTHS)} with the best MC2.",
        "",
        "| vectors | strength | MC1 | MC2 | MC2 minus the paper's |",
        "| --- | --- | --- | --- | --- |",
        *choices(every[1][1], every[1][2], args.layer, args.items),
    ]
    print("\n".join(text))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
