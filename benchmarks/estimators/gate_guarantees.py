"""What gates miss and what sets them off, over many splits of one model's query states.

States are read once; each seed draws queries to fit, to calibrate and to test, and general prompts to learn from and to
be tested on. The tables:

* the playground's questions and general tasks, read by its trained model (width 128);
* TruthfulQA's questions (`--truthfulqa`) against the packaged general prompts, read by a random Llama of width 512: its
  states know tokens, not meanings, which is enough to test coverage, at the published shape (408 queries, rank 128);
* the default gate of both playground tasks, on the halves that `preference_rows` gives;
* the default gate on whole kinds that were held out, calibrated on rows and on kinds (alone: `--only-kinds`).

    python -m benchmarks.estimators.gate_guarantees --truthfulqa TruthfulQA.csv --out benchmarks/results/gate_guarantees.md
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.estimators.gate_kinds import Prompts, by_kind
from finesteer_hf import playground
from finesteer_hf.estimators import (
    AutoScore,
    ConformalGate,
    IntervenedSubspace,
    QuantileGate,
    StateScore,
    cross_fitted_scores,
)
from finesteer_hf.evaluation.data.truthfulqa import load_truthfulqa
from finesteer_hf.evaluation.measures.statistics import mean_with_interval
from finesteer_hf.fitting.capture.jobs import Job
from finesteer_hf.fitting.capture.reader import StateReader
from finesteer_hf.fitting.data.encoding import Passage, encode_prompts
from finesteer_hf.fitting.data.general import default_general_prompts
from finesteer_hf.fitting.data.rows import PromptRow
from finesteer_hf.method_api import CaptureRequest
from finesteer_hf.sites import Site


EPSILON = 0.05
GENERAL_COUNTS = (0, 5, 20, 100)


@dataclass(frozen=True)
class Queries:
    """States of queries that should be steered and of general prompts, `[rows, width]`, and the general ones' kinds."""

    name: str
    ir: np.ndarray
    general: np.ndarray
    kinds: np.ndarray


def states(model: Any, tokenizer: Any, prompts: Sequence[Any], layer: int) -> np.ndarray:
    """States of the prompts' last tokens after a block, in the order of the prompts."""
    site = Site("resid_post", layer)
    reader = StateReader(model, CaptureRequest((site,), ("query",)))
    passages = encode_prompts(tokenizer, [PromptRow(prompt) for prompt in prompts])
    found: dict[Passage, np.ndarray] = {}
    for batch in reader.read([Job(passage) for passage in dict.fromkeys(passages)]):
        found |= dict(zip(batch.prompts, batch.states[site, "query"], strict=True))
    return np.stack([found[passage] for passage in passages])


def as_chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def playground_queries(layer: int) -> Queries:
    model, tokenizer = playground.load()
    prompts = list({row["id"]: row["prompt"] for row in playground.preference_rows("truthful", "all")}.values())
    general = playground.general_rows("all")
    return Queries(
        f"the playground's questions, its trained model, block {layer}",
        states(model, tokenizer, prompts, layer),
        states(model, tokenizer, [row["prompt"] for row in general], layer),
        np.array([row["task"] for row in general]),
    )


def truthfulqa_queries(path: Path, width: int = 512, layer: int = 5) -> Queries:
    _, tokenizer = playground.load()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layer + 1,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(shape).eval()
    packaged, own = default_general_prompts(), playground.general_rows("all")
    general = [*map(as_chat, packaged), *(row["prompt"] for row in own)]
    return Queries(
        f"TruthfulQA's questions, a random Llama of width {width}, block {layer}",
        states(model, tokenizer, [as_chat(item.question) for item in load_truthfulqa(path)], layer),
        states(model, tokenizer, general, layer),
        np.array(["packaged"] * len(packaged) + [row["task"] for row in own]),
    )


def misses(gate: Any, scores: np.ndarray) -> float:
    return float((gate.gate(scores) < 1).mean())


def alarms(gate: Any, scores: np.ndarray) -> float:
    return float((gate.gate(scores) >= 0.5).mean())


def gates(
    rank: int, fit: np.ndarray, calibration: np.ndarray, general: np.ndarray
) -> Iterator[tuple[str, Any, Any, float]]:
    """Name, score, gate and nominal miss rate of every way to set a threshold."""
    rows = np.concatenate([fit, calibration])
    score: Any = IntervenedSubspace(rank).fit(rows)
    in_sample = score.score_samples(rows)
    yield (
        f"in-sample quantile, SER of rank {rank}, nominal 10% (published)",
        score,
        QuantileGate(0.1).fit(in_sample),
        0.1,
    )
    yield f"in-sample quantile, SER of rank {rank}", score, QuantileGate(EPSILON).fit(in_sample), EPSILON
    score = IntervenedSubspace("auto").fit(rows)
    crossed = cross_fitted_scores(score, rows)[0]
    yield "cross-fitted, SER of chosen rank", score, ConformalGate(EPSILON, cross_fitted=True).fit(crossed), EPSILON
    for name, score in (
        (f"SER of rank {rank}", IntervenedSubspace(rank).fit(fit)),
        ("SER of chosen rank", IntervenedSubspace("auto").fit(fit)),
        ("state", StateScore().fit(fit, general)),
    ):
        scores = score.score_samples(calibration)
        yield f"split conformal, {name}", score, ConformalGate(EPSILON).fit(scores), EPSILON
        yield f"PAC (95%), {name}", score, ConformalGate(EPSILON, guarantee="pac").fit(scores), EPSILON


def line(values: Sequence[float]) -> str:
    if len(set(values)) == 1:
        return f"{100 * values[0]:.1f}% in every split"
    found = mean_with_interval(values)
    return f"{100 * found.value:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def by_gate(queries: Queries, rank: int, fitted: int, seeds: int) -> list[str]:
    """Misses and false alarms of every gate; how many splits exceeded the nominal rate."""
    missed: dict[str, list[float]] = defaultdict(list)
    alarmed: dict[str, list[float]] = defaultdict(list)
    nominal = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        order, drawn = rng.permutation(len(queries.ir)), rng.permutation(len(queries.general))
        cut = int(0.7 * fitted)
        parts = [queries.ir[order[:cut]], queries.ir[order[cut:fitted]]]
        test, held_out = queries.ir[order[fitted:]], queries.general[drawn[100:]]
        for name, score, gate, rate in gates(rank, *parts, queries.general[drawn[:100]]):
            nominal[name] = rate
            missed[name].append(misses(gate, score.score_samples(test)))
            alarmed[name].append(alarms(gate, score.score_samples(held_out)))
    return [
        f"{queries.name[0].upper()}{queries.name[1:]}: {fitted} queries to fit and calibrate (70 / 30), "
        f"{len(queries.ir) - fitted} to test, 100 general prompts to learn from, {len(queries.general) - 100} to test; "
        f"{seeds} splits.",
        "",
        "| gate | nominal misses | misses | splits above nominal | false alarms |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {nominal[name]:.0%} | {line(missed[name])} | "
            f"{sum(rate > nominal[name] for rate in missed[name])} of {seeds} | {line(alarmed[name])} |"
            for name in missed
        ),
        "",
    ]


def by_general_prompts(queries: Queries, fitted: int, seeds: int) -> list[str]:
    """False alarms of the calibrated gate against the number of general prompts, and on a kind that was left out."""
    known: dict[int, list[float]] = defaultdict(list)
    unseen: dict[int, list[float]] = defaultdict(list)
    kinds = np.unique(queries.kinds)
    for seed in range(seeds):
        rng = np.random.default_rng(1000 + seed)
        order, drawn = rng.permutation(len(queries.ir)), rng.permutation(len(queries.general))
        cut = int(0.7 * fitted)
        fit, calibration = queries.ir[order[:cut]], queries.ir[order[cut:fitted]]
        new = kinds[seed % len(kinds)]
        others = drawn[queries.kinds[drawn] != new]
        for count in GENERAL_COUNTS:
            for rows, test, found in (
                (drawn[:count], drawn[100:], known),
                (others[:count], np.flatnonzero(queries.kinds == new), unseen),
            ):
                score: Any = StateScore().fit(fit, queries.general[rows]) if count else IntervenedSubspace().fit(fit)
                gate = ConformalGate(EPSILON).fit(score.score_samples(calibration))
                found[count].append(alarms(gate, score.score_samples(queries.general[test])))
    return [
        f"False alarms there, split conformal at {EPSILON:.0%}, by the number of general prompts learned from (0: SER of "
        f"chosen rank; else the state score); {seeds} splits; the kind left out takes turns ({', '.join(kinds)}).",
        "",
        "| general prompts | on general prompts of known kinds | on a kind never learned from |",
        "| --- | --- | --- |",
        *(f"| {count} | {line(known[count])} | {line(unseen[count])} |" for count in GENERAL_COUNTS),
        "",
    ]


def by_task(layer: int, seeds: int) -> list[str]:
    """Misses of the default gate on the other half of each playground task."""
    model, tokenizer = playground.load()
    # What several prompts share: a subject has six questions, a request several wrappers.
    shared = {item.id: item.base for item in playground.world().harmful}
    shared |= {item.id: f"{item.kind}/{item.subject}" for item in playground.world().questions}
    rows = []
    for name, task, split, grouped in (
        ("truthful, new questions on known subjects; calibrated likewise", "truthful", "question", False),
        ("truthful, new subjects; calibrated on known subjects", "truthful", "subject", False),
        ("truthful, new subjects; calibrated on new subjects", "truthful", "subject", True),
        ("safety, new requests; calibrated on known requests", "safety", "question", False),
        ("safety, new requests; calibrated on new requests", "safety", "question", True),
    ):
        missed, alarmed = [], []
        for seed in range(seeds):
            halves = [playground.preference_rows(task, half, split, seed) for half in ("fit", "test")]  # type: ignore[arg-type]
            ours, test = (states(model, tokenizer, [row["prompt"] for row in half], layer) for half in halves)
            general, other = (
                states(model, tokenizer, [row["prompt"] for row in playground.general_rows(half, seed)], layer)
                for half in ("fit", "test")
            )
            groups = [shared[row["id"]] if grouped else row["id"] for row in halves[0]]
            parts = GroupShuffleSplit(1, test_size=0.25, random_state=seed).split(ours, groups=groups)
            fit, calibration = next(iter(parts))
            score = AutoScore(seed=seed).fit(ours[fit], general)
            gate = ConformalGate(EPSILON).fit(score.score_samples(ours[calibration]))
            missed.append(misses(gate, score.score_samples(test)))
            alarmed.append(alarms(gate, score.score_samples(other)))
        rows.append(f"| {name} | {len(test)} | {line(missed)} | {line(alarmed)} |")
    return [
        f"The default gate (score chosen, split conformal at {EPSILON:.0%}) fitted on one half of a playground task, on "
        f"the other half; block {layer}; {seeds} seeds.",
        "",
        "| task | queries to test | misses | false alarms |",
        "| --- | --- | --- | --- |",
        *rows,
    ]


def unseen_kinds(layer: int, seeds: int) -> list[str]:
    """The default gate of both playground tasks on kinds that were held out of the fit."""
    model, tokenizer = playground.load()

    def read(rows: list[dict[str, Any]], kind: str) -> Prompts:
        prompts = [row["prompt"] for row in rows]
        texts = [prompt[0]["content"] for prompt in prompts]
        return Prompts(texts, states(model, tokenizer, prompts, layer), np.array([row[kind] for row in rows]))

    general = read(playground.general_rows("all"), "task")
    text = [
        f"The default gate (score chosen, nominal miss rate {EPSILON:.0%}) on whole kinds that the fit has not seen, by "
        "what it was calibrated on (`gate_calibration`) and how the rows were split. The bound is what the report "
        "promises: for rows of queries of known kinds, for kinds of the next one.",
        "",
    ]
    for task, held_out in (("truthful", 3), ("safety", 2)):
        rows = read(playground.preference_rows(task, "all"), "category")  # type: ignore[arg-type]
        text += by_kind(f"The playground's {task} task, block {layer}", rows, general, held_out, seeds, line)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--task-seeds", type=int, default=10)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--fitted", type=int, default=408, help="queries to fit and calibrate on")
    parser.add_argument("--truthfulqa", type=Path, default=None, help="TruthfulQA.csv")
    parser.add_argument("--only-kinds", action="store_true", help="the table of unseen kinds alone")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the published rank is above what we advise, as shown
    text = [
        f"Mean over splits [95% interval]; nominal miss rate {EPSILON:.0%} if not said otherwise. A miss is a gate below 1 "
        "on a query that should be steered, a false alarm a gate of at least 0.5 on a general prompt that was not learned "
        "from.",
        "",
    ]
    if args.only_kinds:
        print("\n".join(unseen_kinds(args.layer, args.task_seeds)))
        return
    sources = [(playground_queries(args.layer), 32)]
    if args.truthfulqa is not None:
        sources.append((truthfulqa_queries(args.truthfulqa), 128))
    for queries, rank in sources:
        text += by_gate(queries, rank, args.fitted, args.seeds)
        text += by_general_prompts(queries, args.fitted, args.seeds)
    text += by_task(args.layer, args.task_seeds)
    text += ["", *unseen_kinds(args.layer, args.task_seeds)]
    print("\n".join(text))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
