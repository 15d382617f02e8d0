"""All methods on the playground's two tasks, fitted by one call on one store, held out: effect, side effects and cost.

One JSON file a method and task, which a later run uses again, and a page made of them. Nothing is chosen on the test half:
every method chooses its layer and strength in its own fit. Timing comes last, for all methods that are there.

    python benchmarks/compare_methods.py --out runs/compare --page benchmarks/results/compare_methods.md
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from compare_methods_page import page
from paired_timing import Condition, Generate, time_pairs

from finesteer_hf import CAAConfig, FineSteerConfig, SteeredModelForCausalLM, playground, steering_methods
from finesteer_hf.adapter import SteeringAdapter
from finesteer_hf.config import SteeringConfig, get_steering_method
from finesteer_hf.evaluation.behaviour import JudgedPrompt, Outcome, evaluate
from finesteer_hf.evaluation.playground_eval import TASKS, Task, fit_rows, general_prompts, target_prompts
from finesteer_hf.fitting import fit_steering
from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.fitting.inputs import prepare_inputs
from finesteer_hf.methods.strength import choose_strength
from finesteer_hf.processors import SteeringProcessor


MAX_NEW_TOKENS, TIMED_TOKENS, TIMED_ROWS = 24, 32, 8
# Nats at which methods are compared at equal dose.
EQUAL_DOSE = 0.05
# Strengths of the equal-dose curve, in units of the one that the fit chose.
AROUND = (0.25, 0.5, 1.0, 2.0)
REMARKS = Path(__file__).with_name("compare_methods_remarks.md")
# Nothing to fit, or nothing that could be compared with others.
LEFT_OUT = {"CONSTANT"}


def configs() -> dict[str, tuple[SteeringConfig, str]]:
    """For each row of the table its settings, and what is not default in them."""
    found = {name: (get_steering_method(name).config_cls(), "") for name in steering_methods() if name not in LEFT_OUT}
    rank = "rank 32 for the published 128, which is this model's whole width"
    found["FINESTEER, paper"] = FineSteerConfig.paper(subspace_rank=32), rank
    found["FINESTEER, paper, strength chosen"] = FineSteerConfig.paper(subspace_rank=32, strength="auto"), rank
    found["CAA, all positions"] = CAAConfig(positions="all"), 'positions="all"'
    found["CAA, refusal vector"] = (
        CAAConfig(positions="all", vector="queries"),
        'vector="queries", positions="all"',
    )
    return found


@dataclasses.dataclass
class Bench:
    """What all methods of a task share.

    Attributes:
        name: `truthful` or `safety`.
        folder: of its results.
        base: the model that is fitted on.
        steered: the model that is asked.
        tokenizer: of both.
        targets: held-out prompts whose answers should change.
        general: held-out prompts whose answers should not.
    """

    name: Task
    folder: Path
    base: Any
    steered: Any
    tokenizer: Any
    targets: list[JudgedPrompt]
    general: list[JudgedPrompt]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Preference rows of the fit half."""
        return fit_rows(self.name, split="question", limit=600, seed=0)

    @functools.cached_property
    def dose(self) -> DoseRunner:
        """Measures divergence on the general prompts that fits hold out."""
        inputs = prepare_inputs(self.tokenizer, self.rows, None, playground.general_rows("fit"), seed=0, split="group")
        held_out = [inputs.rows[i] for i in inputs.split.rows["validation"]]
        # Only the divergence is used here; the wanted answers of a few rows come with it.
        return DoseRunner(self.base, held_out[:8], inputs.side_effects, 0)

    def ask(self, adapter: str | None = None) -> tuple[Outcome, Outcome]:
        """Answers to the targets and to the general prompts."""
        ask = functools.partial(
            evaluate, self.steered, self.tokenizer, adapter=adapter, choices=False, max_new_tokens=MAX_NEW_TOKENS
        )
        return ask(self.targets), ask(self.general)

    @functools.cached_property
    def unsteered(self) -> tuple[Outcome, Outcome]:
        """Answers of the base model."""
        return self.ask()


def fit(task: Bench, config: SteeringConfig) -> SteeringAdapter:
    """Fit on the task's store."""
    return fit_steering(
        task.base,
        task.tokenizer,
        task.rows,
        config,
        split="group",
        general_dataset=playground.general_rows("fit"),
        progress=False,
        seed=0,
        store_dir=task.folder / "states",
    )


def judged(task: Bench, adapter: SteeringAdapter) -> dict[str, Any]:
    """What an adapter does to the held-out prompts, as counts; hits of the targets one by one."""
    task.steered.load_steering(adapter, "method")
    try:
        target, general = task.ask("method")
    finally:
        task.steered.delete_steering("method")
    fires = [None if found is None else found.k for found in (target.fires(), general.fires())]
    return {
        "hits": target.hits,
        "neither": sum(verdict is None for verdict in target.verdicts),
        "general_hits": general.share.k,
        "identical": general.identical_to(task.unsteered[1]).k,
        "fires": None if None in fires else fires,
        "general": len(task.general),
    }


def at_strength(adapter: SteeringAdapter, strength: float) -> SteeringAdapter:
    """The same adapter, stronger or weaker."""
    return SteeringAdapter(dataclasses.replace(adapter.config, strength=strength), adapter.tensors)


def at_equal_dose(task: Bench, adapter: SteeringAdapter) -> dict[str, Any]:
    """The strength at which general prompts diverge by `EQUAL_DOSE` nats; None where the gate spares them.

    With the divergences there and at the adapter's own strength.
    """
    method_cls = get_steering_method(adapter.config.steering_type).method_cls
    own = float(cast(float, adapter.config.strength))

    def build(strength: float) -> SteeringProcessor:
        return method_cls(dataclasses.replace(adapter.config, strength=strength), adapter.tensors)

    data = cast(Any, types.SimpleNamespace(dose_response=task.dose.run))
    strengths = [own * factor for factor in AROUND]
    try:
        strength, curve, _ = choose_strength(
            f"kl:{EQUAL_DOSE}", data, build, vector_norm=1.0, state_norm=1.0, strengths=strengths
        )
    except ValueError:
        return {"strength": None, "kl": 0.0, "own_kl": 0.0}
    kl, own_kl = (next(point.kl for point in curve if point.strength == at) for at in (strength, own))
    # A gate that lets next to nothing through: what is left of the divergence does not reach the dose at any strength.
    return {"strength": strength if kl > EQUAL_DOSE / 2 else None, "kl": kl, "own_kl": own_kl}


def measured(task: Bench, label: str, config: SteeringConfig, note: str) -> dict[str, Any]:
    """Fit a method and measure all of it but its time."""
    adapter = fit(task, config)
    folder = adapter.save_pretrained(task.folder / slug(label))
    adapter = SteeringAdapter.from_pretrained(folder)
    own = judged(task, adapter)
    dose = at_equal_dose(task, adapter)
    if dose["strength"] is not None:
        dose |= judged(task, at_strength(adapter, dose["strength"]))
    return {
        "label": label,
        "task": task.name,
        "note": note,
        "strength": adapter.config.strength,
        "where": {
            key: adapter.config.to_dict()[key] for key in ("layer", "layers") if key in adapter.config.to_dict()
        },
        "seconds": adapter.config.fit["seconds"],
        "bytes": (Path(folder) / "steering_model.safetensors").stat().st_size,
        "own": own,
        "dose": dose,
    }


def unsteered(task: Bench) -> dict[str, Any]:
    """The base model's row."""
    target, general = task.unsteered
    return {
        "label": "unsteered",
        "task": task.name,
        "own": {
            "hits": target.hits,
            "neither": sum(verdict is None for verdict in target.verdicts),
            "general_hits": general.share.k,
            "general": len(task.general),
        },
    }


def timed(task: Bench, labels: list[str], pairs: int) -> dict[str, dict[str, list[float]]]:
    """For each method the ratios of its times to unsteered ones: median and quartiles by phase."""
    chats = [prompt.prompt for prompt in task.targets[:TIMED_ROWS]]
    inputs = task.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
    )
    settings = {"max_new_tokens": TIMED_TOKENS, "min_new_tokens": TIMED_TOKENS, "do_sample": False}
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    @contextlib.contextmanager
    def condition(name: str) -> Iterator[Generate]:
        yield functools.partial(task.steered.generate, steering=name, **settings)

    names = {label: slug(label) for label in labels}
    for label, name in names.items():
        task.steered.load_steering(SteeringAdapter.from_pretrained(task.folder / slug(label)), name)
    task.steered.set_steering(None)
    conditions: dict[str, Condition] = {label: functools.partial(condition, name) for label, name in names.items()}
    plain = functools.partial(task.steered.generate, steering=None, **settings)
    found = {
        label: ratios.summary()
        for label, _, ratios in time_pairs(plain, conditions, inputs, torch.device("cpu"), pairs)
    }
    for name in names.values():
        task.steered.delete_steering(name)
    return found


def slug(label: str) -> str:
    """A label as a file name."""
    return label.lower().replace(", ", "-").replace(" ", "-")


def write(file: Path, found: Any) -> None:
    """Write JSON, whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    part.replace(file)


def run(task: Bench, labels: list[str], pairs: int, seconds: float) -> None:
    """Measure what is not there yet.

    Args:
        task: the task.
        labels: rows of the table.
        pairs: timed pairs of each; 0 leaves timing out.
        seconds: no method is begun after so long.
    """
    started = time.perf_counter()
    base = task.folder / "unsteered.json"
    if not base.exists():
        write(base, unsteered(task))
    for label in labels:
        config, note = configs()[label]
        file = task.folder / f"{slug(label)}.json"
        if file.exists() or time.perf_counter() - started > seconds:
            continue
        start = time.perf_counter()
        found = measured(task, label, config, note)
        write(file, found)
        share = sum(found["own"]["hits"]) / len(found["own"]["hits"])
        took = f"fit {found['seconds']['fit']:.0f} s, in all {time.perf_counter() - start:.0f} s"
        print(f"{task.name}: {label}: {share:.1%} of targets ({took})", flush=True)
    ready = [label for label in labels if (task.folder / f"{slug(label)}.json").exists()]
    if pairs:
        for label, ratios in timed(task, ready, pairs).items():
            file = task.folder / f"{slug(label)}.json"
            write(file, json.loads(file.read_text()) | {"time": ratios, "pairs": pairs})
        print(f"{task.name}: timed {len(ready)} methods", flush=True)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of adapters, states and results")
    parser.add_argument("--methods", nargs="+", default=list(configs()), choices=list(configs()), metavar="METHOD")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--targets", type=int, default=300, help="held-out targets, and as many general prompts")
    parser.add_argument("--pairs", type=int, default=0, help="timed pairs of each method; 0: no timing in this run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no method of a task after so long")
    parser.add_argument("--page", type=Path, default=None, help="page to write from all results in --out")
    parser.add_argument("--remarks", type=Path, default=REMARKS, help="markdown that the page puts before the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # findings about the data are the same for every method
    for name in args.tasks:
        folder = args.out / f"{name}-{args.targets}"
        folder.mkdir(parents=True, exist_ok=True)
        base, tokenizer = playground.load()
        steered = SteeredModelForCausalLM.from_pretrained(playground.model_path())
        targets = target_prompts(name, split="question", limit=args.targets, seed=0)
        general = general_prompts(limit=args.targets, seed=0)
        task = Bench(name, folder, base, steered, tokenizer, targets, general)
        run(task, args.methods, args.pairs, args.seconds)
    if args.page is not None:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(page(args.out, args.targets, EQUAL_DOSE, TIMED_ROWS, TIMED_TOKENS, remarks=args.remarks))


if __name__ == "__main__":
    main()
