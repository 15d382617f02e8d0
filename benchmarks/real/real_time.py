"""Time of whole fits on the real model against one plain pass over their texts, on one thread, in bfloat16.

A plain pass puts each text (prompt with chosen, prompt with rejected, general prompt) through the model by itself. It is
measured before, between and after the fits, so that a machine that becomes busier shows, and each in a process of its
own. Seconds are the processor's: what a thread takes on a core that nobody else uses.

    python -m benchmarks.real.real_time --out out/real
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.real.real_data import QUICK, Sizes, general_data, truthful_halves, truthful_rows
from benchmarks.real.real_setup import load_model
from benchmarks.speed.own_process import in_its_own_process, measured
from finesteer_hf import FineSteerConfig, fit_steering
from finesteer_hf.evaluation.measures.prompts import encode_pairs, encode_prompt


FITS: dict[str, dict[str, Any]] = {"closed form": {"refine": 0}, "default": {}}


def fit_texts(tokenizer: Any, rows: list[dict[str, Any]], general: list[dict[str, Any]]) -> list[list[int]]:
    """Token ids of everything that a fit reads."""
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    answers = [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]
    pairs = zip(*encode_pairs(tokenizer, prompts, answers), strict=True)
    return [[*prompt, *answer] for prompt, answer in pairs] + [
        encode_prompt(tokenizer, row["prompt"]) for row in general
    ]


def fit_data(data: Path, sizes: Sizes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and general rows of the truthful task."""
    return truthful_rows(truthful_halves(data, sizes)[0]), general_data(data, sizes).fit_rows()


def quiet() -> None:
    """One thread, no bars; for each process."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def plain_pass(source: str, data: Path, sizes: Sizes) -> dict[str, Any]:
    """What one pass takes, one text at a time."""
    quiet()
    model, tokenizer = load_model(source, torch.bfloat16)
    texts = fit_texts(tokenizer, *fit_data(data, sizes))

    @torch.inference_mode()
    def read(some: list[list[int]]) -> None:
        for ids in some:
            model(input_ids=torch.tensor([ids]), use_cache=False)

    read(texts[:4])
    _, seconds, peak = measured(functools.partial(read, texts))
    return {"seconds": seconds, "peak_mb": peak, "texts": len(texts), "tokens": sum(map(len, texts))}


def whole_fit(source: str, data: Path, sizes: Sizes, changes: dict[str, Any]) -> dict[str, Any]:
    """What a fit takes, with no store: the default one but for some settings."""
    quiet()
    model, tokenizer = load_model(source, torch.bfloat16)
    rows, general = fit_data(data, sizes)
    config = FineSteerConfig(**changes)
    _, seconds, peak = measured(
        lambda: fit_steering(model, tokenizer, rows, config, general_dataset=general, progress=False, seed=0)
    )
    return {"seconds": seconds, "peak_mb": peak}


def compare(source: str, data: Path, sizes: Sizes) -> dict[str, Any]:
    """Passes with the fits between them."""
    passes, fits = [in_its_own_process(plain_pass, source, data, sizes)], {}
    print(f"one plain pass: {passes[0]['seconds']:.0f} s", flush=True)
    for name, changes in FITS.items():
        fits[name] = in_its_own_process(whole_fit, source, data, sizes, changes)
        passes.append(in_its_own_process(plain_pass, source, data, sizes))
        beside = (passes[-2]["seconds"] + passes[-1]["seconds"]) / 2
        fits[name]["passes"] = fits[name]["seconds"] / beside
        print(f"{name}: {fits[name]['seconds']:.0f} s, {fits[name]['passes']:.1f} passes", flush=True)
    rows, general = fit_data(data, sizes)
    return {"passes": passes, "fits": fits, "rows": len(rows), "general": len(general)}


def main() -> None:
    """Measure, unless it was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", default=None, help="any causal LM's folder or id; by default --out's own `model`")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--quick", action="store_true", help="a few rows")
    args = parser.parse_args()
    folder = args.out / "quick" if args.quick else args.out
    file = folder / "time.json"
    if file.exists():
        print(f"{file}: measured before")
        return
    source = args.model or str(args.out / "model")
    found = compare(source, args.data, QUICK if args.quick else Sizes())
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
