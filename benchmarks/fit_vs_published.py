"""Fitting against a re-creation of the published pipeline's steps: same model, layer and data, in one run.

Published, as its released code does it: for each record three forwards of the whole model, one text at a time, with all
hidden states kept (the prompt for the query's state, prompt and chosen, prompt and rejected); then PCA of rank 128 for
the gate, and the mixture of experts with full-width keys, trained by AdamW. Ours: `StateReader` and the default closed
forms, gate included.
Strength and layer are given to both, so that neither searches.

    python benchmarks/fit_vs_published.py --width 512 --layers 16 --rows 300
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from finesteer_hf import FineSteerConfig, fit_steering, playground
from finesteer_hf.estimators import IntervenedSubspace, PaperMoSE, QuantileGate, held_out_r2
from finesteer_hf.fitting.capture import StateReader
from finesteer_hf.fitting.data import parse_preferences
from finesteer_hf.fitting.jobs import make_jobs
from finesteer_hf.fitting.templating import EncodedRow, encode_preferences
from finesteer_hf.methods.base import CaptureRequest
from finesteer_hf.sites import Site


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


@torch.no_grad()
def published_capture(model: Any, rows: list[EncodedRow], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and shifts: three passes a record, batch 1, every hidden state and the logits computed."""
    queries, shifts = [], []
    for row in rows:
        states = []
        for passage in (row.prompt, row.chosen, row.rejected):
            out = model(input_ids=torch.tensor([passage.ids]), output_hidden_states=True)
            hidden = out.hidden_states[layer + 1][0].float()
            states.append(hidden[-1] if passage.answer_start is None else hidden[passage.answer_start :].mean(0))
        queries.append(states[0].numpy())
        shifts.append((states[1] - states[2]).numpy())
    return np.stack(queries), np.stack(shifts)


def published_fit(queries: np.ndarray, shifts: np.ndarray) -> tuple[Any, float]:
    """Gate and experts; returns the experts and the size of all parameters in MB of fp32."""
    rank = min(128, len(queries) - 1, queries.shape[1])
    subspace = IntervenedSubspace(rank).fit(queries)
    QuantileGate(0.1).fit(subspace.score_samples(queries))
    experts = PaperMoSE(seed=42).fit(queries, shifts)
    # The released checkpoint holds the query and key maps at full width, not folded.
    width = queries.shape[1]
    unfolded = sum(tensor.numel() for tensor in experts.state().values()) + 2 * width * width
    return experts, (unfolded + width * (rank + 1)) * 4 / 1e6


def captured(model: Any, rows: list[EncodedRow], layer: int, **options: Any) -> StateReader:
    reader = StateReader(model, CaptureRequest((Site("resid_post", layer),)), **options)
    for _ in reader.read(make_jobs(rows)):
        pass
    return reader


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--layer", type=int, default=5, help="read and write layer; about a third of the depth")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--playground", action="store_true", help="the trained playground model, for the R2 that counts"
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    organism, tokenizer = playground.load()
    if args.playground:
        model = organism
        args.layer = min(args.layer, model.config.num_hidden_layers // 2)
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=args.width * 11 // 4,
            num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=8, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
    fit_rows = playground.preference_rows("truthful", "fit")[: args.rows]
    test_rows = playground.preference_rows("truthful", "test")[: args.rows // 2]
    general = playground.general_rows("fit")[:128]
    encoded = encode_preferences(tokenizer, parse_preferences(fit_rows)).rows
    held_out = encode_preferences(tokenizer, parse_preferences(test_rows)).rows
    captured(model, encoded[:8], args.layer)  # warm-up

    config = FineSteerConfig(layer=args.layer, strength=2.5)
    before = peak_mb()
    adapter, ours = timed(
        lambda: fit_steering(model, tokenizer, fit_rows, config, general_dataset=general, progress=False)
    )
    ours_mb = peak_mb() - before
    own_size = sum(tensor.numel() for tensor in adapter.tensors.values()) * 4 / 1e6
    (queries, shifts), capture_time = timed(lambda: published_capture(model, encoded, args.layer))
    (experts, size), fit_time = timed(lambda: published_fit(queries, shifts))
    published_mb = peak_mb() - before

    test_queries, test_shifts = published_capture(model, held_out, args.layer)
    constant = np.broadcast_to(shifts.mean(0), test_shifts.shape)
    site = Site("resid_post", args.layer)
    from finesteer_hf import QueryStates

    decision = adapter.build().decide(
        QueryStates({site: torch.tensor(test_queries)}, len(test_queries), torch.device("cpu"))
    )
    own_r2 = held_out_r2(test_shifts, decision.vectors[site].numpy(), constant)
    published_r2 = held_out_r2(test_shifts, experts.predict(test_queries), constant)

    table = Table("", "published steps", "finesteer_hf", "ratio", title="fit of gate and experts")
    table.add_row(
        "seconds", f"{capture_time + fit_time:.1f}", f"{ours:.1f}", f"{(capture_time + fit_time) / ours:.1f}x"
    )
    table.add_row("  states", f"{capture_time:.1f}", f"{adapter.config.fit['seconds']['capture']:.1f}", "")
    table.add_row("  gate and experts", f"{fit_time:.1f}", f"{adapter.config.fit['seconds']['fit']:.1f}", "")
    table.add_row("peak memory above start, MB (ours ran first)", f"{published_mb:.0f}", f"{ours_mb:.0f}", "")
    table.add_row("size, MB fp32", f"{size:.1f}", f"{own_size:.2f}", f"{size / own_size:.0f}x")
    table.add_row(f"held-out R2 against the constant (n={len(test_rows)})", f"{published_r2:.3f}", f"{own_r2:.3f}", "")
    causes = Table(
        "reading states", "seconds", "passes", "real tokens", title="where the time goes, one step at a time"
    )
    causes.add_row(
        "published: 3 passes, batch 1, all layers and head", f"{capture_time:.2f}", str(3 * len(encoded)), ""
    )
    for name, options in (
        ("stop at the deepest site", {"batch_size": 1, "share_prompts": False}),
        ("and batches of like length", {"share_prompts": False}),
        ("and a prompt shared by its answers", {"share_prompts": True}),
    ):
        reader, seconds = timed(lambda options=options: captured(model, encoded, args.layer, **options))
        causes.add_row(name, f"{seconds:.2f}", str(reader.count.passes), str(reader.count.tokens))
    longest = max(encoded, key=lambda row: len(row.chosen.ids)).chosen.ids
    batch = torch.tensor([list(longest)] * max(1, 2048 // len(longest)))
    with torch.no_grad():
        sub = model.model
        depth, sub.layers = sub.layers, sub.layers[: args.layer + 1]
        count, sub.config.num_hidden_layers = sub.config.num_hidden_layers, args.layer + 1
        _, floor = timed(lambda: [sub(input_ids=batch, use_cache=False) for _ in range(5)])
        sub.layers, sub.config.num_hidden_layers = depth, count
    unique = captured(model, encoded, args.layer, share_prompts=True).count.tokens
    causes.add_row(
        "floor: those tokens at the speed of full batches",
        f"{floor / (5 * batch.numel()) * unique:.2f}",
        "",
        str(unique),
    )
    console = Console(record=True, width=110)
    parameters = sum(p.numel() for p in model.parameters())
    kind = "the playground's model" if args.playground else "a random Llama"
    console.print(
        f"{kind}: {parameters / 1e6:.1f} M parameters, layer {args.layer}, {len(encoded)} rows, {args.threads} thread(s)"
    )
    console.print(table)
    console.print(causes)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(console.export_text())


if __name__ == "__main__":
    main()
