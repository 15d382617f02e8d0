"""What `fit_vs_published` runs: the published steps and ours, on the same rows, each measured in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed.own_process import measured
from benchmarks.speed.planted_data import PlantedData
from benchmarks.speed.published_steps import published_capture, published_fit
from finesteer_hf import FineSteerConfig, QueryStates, SteeringAdapter, fit_steering, playground
from finesteer_hf.estimators import PaperMoSE
from finesteer_hf.evaluation.data.truthfulqa import load_truthfulqa
from finesteer_hf.evaluation.data.truthfulqa import preference_rows as truthfulqa_rows
from finesteer_hf.fitting.capture.jobs import Job, make_jobs
from finesteer_hf.fitting.capture.reader import CaptureCount, StateReader
from finesteer_hf.fitting.data.encoding import EncodedRow, encode_preferences
from finesteer_hf.fitting.data.rows import read_preferences
from finesteer_hf.method_api import CaptureRequest
from finesteer_hf.methods.finesteer.method import FineSteer
from finesteer_hf.sites import Site


# With `--instructed`: TruthfulQA's questions in the published form, a system message and an instruction.
SYSTEM = "You are helpful, honest and concise."
# A cost per row needs no more of them.
LADDER_ROWS = 40
WARM_UP_ROWS = 24


@dataclass(frozen=True)
class Setting:
    """A model and its data; `truthfulqa` None and `width` None stand for the playground's own."""

    width: int | None
    layers: int
    vocabulary: int
    layer: int
    rows: int
    threads: int
    truthfulqa: Path | None
    instructed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a pipeline took: seconds (of it, those for the states), peak memory above its start, megabytes; and gave."""

    seconds: float
    capture_seconds: float
    peak_mb: float
    size_mb: float
    predicted: np.ndarray
    notes: str = ""


def prepared(setting: Setting) -> tuple[Any, Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """Model, tokenizer, rows to fit and rows to test."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    model, tokenizer = playground.load()
    if setting.width is not None:
        heads = setting.width // 64
        shape = LlamaConfig(
            vocab_size=setting.vocabulary,
            hidden_size=setting.width,
            intermediate_size=setting.width * 11 // 4,
            num_hidden_layers=setting.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            pad_token_id=0,
        )
        model = LlamaForCausalLM(shape).eval()
    if setting.truthfulqa is not None:
        rows = truthfulqa_rows(load_truthfulqa(setting.truthfulqa), system=SYSTEM if setting.instructed else None)
        for row in rows if setting.instructed else ():
            asked = row["prompt"][-1]
            asked["content"] = f"Answer the question concisely. Q: {asked['content']} A:"
    else:
        rows = playground.preference_rows("truthful", "all")
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    fit, test = rows[: setting.rows], rows[setting.rows :]
    return model, tokenizer, fit, test


def encoded(tokenizer: Any, rows: list[dict[str, Any]]) -> list[EncodedRow]:
    return encode_preferences(tokenizer, read_preferences(rows).rows).rows


def states(
    model: Any, jobs: Sequence[Job], sites: tuple[Site, ...], **options: Any
) -> tuple[CaptureCount, dict[Any, np.ndarray]]:
    """Run the reader; its count, and the states of the first site by passage."""
    reader, found = StateReader(model, CaptureRequest(sites), **options), {}
    for batch in reader.read(jobs):
        found |= dict(zip(batch.prompts, batch.states[sites[0], "query"], strict=True))
        found |= dict(zip(batch.answers, batch.states[sites[0], "answer_mean"], strict=True))
    return reader.count, found


def run_published(setting: Setting) -> tuple[Outcome, np.ndarray, np.ndarray, np.ndarray]:
    """The outcome, and for both pipelines: the test queries, the test shifts and the mean shift of the fit."""
    model, tokenizer, fit, test = prepared(setting)
    held_out = encoded(tokenizer, test)
    published_fit(*published_capture(model, encoded(tokenizer, fit[:WARM_UP_ROWS]), setting.layer))
    clock: list[float] = []

    def whole() -> tuple[np.ndarray, tuple[PaperMoSE, float]]:
        queries, shifts = published_capture(model, encoded(tokenizer, fit), setting.layer)
        clock.append(time.process_time())
        return shifts, published_fit(queries, shifts)

    start = time.process_time()
    (shifts, (experts, size)), seconds, peak = measured(whole)
    _, found = states(model, make_jobs(held_out), (Site("resid_post", setting.layer),))
    queries = np.stack([found[row.prompt] for row in held_out])
    test_shifts = np.stack([found[row.chosen] - found[row.rejected] for row in held_out])
    notes = f"K={experts.num_experts_}, {len(experts.history_)} epochs"
    outcome = Outcome(seconds, clock[0] - start, peak, size, experts.predict(queries), notes)
    return outcome, queries, test_shifts, shifts.mean(0)


def run_ours(setting: Setting, test_queries: np.ndarray, general: str | None) -> Outcome:
    model, tokenizer, fit, _ = prepared(setting)
    config = FineSteerConfig(layer=setting.layer, strength=2.5, experts="mixture", target="difference")

    def fitted(rows: list[dict[str, Any]]) -> SteeringAdapter:
        return fit_steering(model, tokenizer, rows, config, general_dataset=general, progress=False)

    fitted(fit[:WARM_UP_ROWS])
    adapter, seconds, peak = measured(lambda: fitted(fit))
    assert isinstance(adapter.config, FineSteerConfig)
    site = Site("resid_post", setting.layer)
    queries = QueryStates({site: torch.tensor(test_queries)}, len(test_queries), torch.device("cpu"))
    vectors = adapter.build().decide(queries).vectors[site].numpy()
    chosen = adapter.config
    notes = f"{chosen.experts}, K={chosen.num_experts}, rank {chosen.residual_rank}, score {chosen.gate_score}"
    clock = chosen.fit["seconds"]
    reading = seconds * (1 - clock["fit"] / sum(clock.values()))
    return Outcome(seconds, reading, peak, saved_size(adapter), vectors, notes)


def saved_size(adapter: SteeringAdapter) -> float:
    """Megabytes of the tensors' file."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        return (Path(folder) / "steering_model.safetensors").stat().st_size / 1e6


def run_causes(setting: Setting) -> tuple[list[list[str]], list[list[str]], float]:
    """The ladder from the published steps to ours, ours with one step taken back, and the floor in seconds."""
    model, tokenizer, fit, _ = prepared(setting)
    rows, site = encoded(tokenizer, fit[:LADDER_ROWS]), Site("resid_post", setting.layer)
    jobs, last = make_jobs(rows), Site("resid_post", setting.layers - 1)
    apart = [Job(prompt) for prompt in dict.fromkeys(row.prompt for row in rows)]
    apart += [Job(None, (answer,)) for row in rows for answer in (row.chosen, row.rejected)]

    def read(what: Sequence[Job], sites: tuple[Site, ...] = (site,), **options: Any) -> tuple[float, CaptureCount]:
        states(model, what[:2], sites, **options)
        (count, _), seconds, _ = measured(lambda: states(model, what, sites, **options))
        return seconds, count

    _, whole, _ = measured(lambda: published_capture(model, rows, setting.layer))
    tokens = sum(len(p.ids) for row in rows for p in (row.prompt, row.chosen, row.rejected))
    ladder: list[list[Any]] = [
        ["published: three passes a row, batch 1, all blocks and the head", whole, 3 * len(rows), tokens]
    ]
    for name, what, options in (
        ("stop after the deepest site", apart, {"batch_size": 1, "share_prompts": False}),
        ("read the query in the pass of an answer", jobs, {"batch_size": 1, "share_prompts": False}),
        (
            "run a prompt once for its two answers, its beginning once for all",
            jobs,
            {"batch_size": 2, "share_prompts": True},
        ),
        ("batch texts of like length", jobs, {"share_prompts": True}),
    ):
        seconds, count = read(what, **options)
        ladder.append([name, seconds, count.passes, count.tokens])
    ours, count = seconds, count
    without: list[list[Any]] = [
        ["all blocks run (the head still does not)", *read(jobs, (site, last), share_prompts=True)],
        ["prompts run whole with each answer", *read(jobs, share_prompts=False)],
        ["one row at a time", *read(jobs, batch_size=2, share_prompts=True)],
    ]
    steps = [
        [name, f"{took:.2f}", f"{before / took:.2f}x", f"{whole / took:.1f}x", str(passes), str(seen)]
        for (name, took, passes, seen), before in zip(ladder, [whole] + [row[1] for row in ladder], strict=False)
    ]
    taken_back = [[name, f"{took:.2f}", f"{took / ours:.2f}x"] for name, took, _ in without]
    return steps, taken_back, floor_seconds(model, setting, count.tokens)


def floor_seconds(model: Any, setting: Setting, tokens: int) -> float:
    """Seconds of the matrix products that no reader can avoid, at the speed of a large one; attention is left out."""
    blocks = model.model.layers[: setting.layer + 1]
    weights = [module.weight for module in blocks.modules() if isinstance(module, torch.nn.Linear)]
    rows, weight = torch.randn(2048, weights[-1].shape[1]), torch.randn_like(weights[-1])
    speeds = []
    for _ in range(9):
        start = time.process_time()
        torch.nn.functional.linear(rows, weight)
        speeds.append(2 * len(rows) * weight.numel() / (time.process_time() - start))
    return 2 * tokens * sum(weight.numel() for weight in weights) / float(np.median(speeds))


def wide_published(width: int, rows: int, threads: int) -> Outcome:
    torch.set_num_threads(threads)
    data = PlantedData(width, rows)
    parts = ("fit", "calibration", "validation")
    queries, shifts = (np.concatenate([found[part] for part in parts]) for found in (data.queries, data.shifts))
    (experts, size), seconds, peak = measured(lambda: published_fit(queries, shifts))
    notes = f"K={experts.num_experts_}, {len(experts.history_)} epochs"
    return Outcome(seconds, 0.0, peak, size, experts.predict(data.queries["test"]), notes)


def wide_ours(width: int, rows: int, threads: int) -> Outcome:
    torch.set_num_threads(threads)
    data, config = (
        PlantedData(width, rows),
        FineSteerConfig(layer=12, strength=2.5, experts="mixture", target="difference"),
    )
    result, seconds, peak = measured(lambda: FineSteer.fit(data, config))  # type: ignore[arg-type]
    adapter = SteeringAdapter(result.config, result.tensors)
    site = Site("resid_post", 12)
    queries = QueryStates({site: torch.tensor(data.queries["test"])}, rows, torch.device("cpu"))
    vectors = adapter.build().decide(queries).vectors[site].numpy()
    chosen = result.config
    assert isinstance(chosen, FineSteerConfig)
    notes = f"{chosen.experts}, K={chosen.num_experts}, rank {chosen.residual_rank}, score {chosen.gate_score}"
    return Outcome(seconds, 0.0, peak, saved_size(adapter), vectors, notes)
