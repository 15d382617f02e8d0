"""What details of the published codes change on the playground: FineSteer's training, AlphaSteer's reads.

FineSteer: `PaperMoSE` as the paper's equations say and as the code trains (`compat="official"`: biases in W_Q, W_K and
W_V, a random W_V, K by the median of three criteria, validation rows drawn one by one); held-out R2 of the vectors over
seeds, which draw the halves and the weights. AlphaSteer: all layers read from the unsteered prompt, as the package does,
and each read where earlier layers have already written, as the code does, by plain hooks; the same adapter and strength.

    python -m benchmarks.estimators.official_details --out benchmarks/results/official_details.md       # about ten minutes
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.estimators.vector_defaults import Rows, Splitter, show, tasks
from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, fit_steering, playground
from finesteer_hf.estimators import PaperMoSE, held_out_r2
from finesteer_hf.evaluation.behaviour import evaluate
from finesteer_hf.evaluation.data.playground_eval import fit_rows, general_prompts, target_prompts
from finesteer_hf.evaluation.measures.statistics import paired_difference, proportion
from finesteer_hf.methods.alphasteer import AlphaSteerConfig


NEW_TOKENS = 24
# Of the strength that the fit chose, at which all requests are refused either way.
SCALES = (0.25, 0.5, 1.0)


def trained(name: str, rows: Rows, split: Splitter, seeds: int) -> list[str]:
    """Held-out R2 of a task's vectors, by variant, as the paper and as the code has it."""
    lines = []
    for variant in ("paper", "orthogonal"):
        r2: dict[str | None, list[float]] = {None: [], "official": []}
        counts: dict[str | None, list[int]] = {None: [], "official": []}
        for seed in range(seeds):
            fit, test = split(seed)
            (queries, shifts), (new, wanted) = rows.take(fit), rows.take(test)
            constant = np.broadcast_to(shifts.mean(0), wanted.shape)
            for compat in r2:
                experts = PaperMoSE(variant=variant, compat=compat, seed=seed).fit(queries, shifts)
                r2[compat].append(held_out_r2(wanted, experts.predict(new), constant))
                counts[compat].append(experts.num_experts_)
        gain = paired_difference(r2[None], r2["official"])
        both = " / ".join(",".join(map(str, sorted(set(counts[compat])))) for compat in r2)
        lines.append(
            f"| {name}, {variant} | {show(r2[None])} | {show(r2['official'])} | {gain.value:+.3f} "
            f"[{gain.low:+.3f}, {gain.high:+.3f}] | {both} |"
        )
    return lines


@contextlib.contextmanager
def cascade(model: Any, adapter: SteeringAdapter, scale: float) -> Iterator[list[list[float]]]:
    """Plain hooks that read the query where earlier layers have written; gives the pushes w . h by layer."""
    config: Any = adapter.config
    pushes: list[list[float]] = [[] for _ in config.layers]
    handles = []
    for row, layer in enumerate(config.layers):
        refusal, probe = adapter.tensors["refusal"][row], adapter.tensors["probe"][row]

        def hook(
            module: Any, args: Any, kwargs: Any, refusal: Any = refusal, probe: Any = probe, row: int = row
        ) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] == 1:
                return None
            push = hidden[:, -1] @ probe
            pushes[row].extend(push.tolist())
            moved = hidden + scale * config.strength * push[:, None, None] * refusal
            return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

        handles.append(model.model.layers[layer].register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield pushes
    finally:
        for handle in handles:
            handle.remove()


def alphasteer(limit: int) -> list[str]:
    """Refusals and untouched general prompts with either way of reading."""
    base, tokenizer = playground.load()
    adapter = fit_steering(
        base,
        tokenizer,
        fit_rows("safety", split="question", limit=600, seed=0),
        AlphaSteerConfig(),
        split="group",
        general_dataset=playground.general_rows("fit"),
        progress=False,
        seed=0,
    )
    steered = SteeredModelForCausalLM.from_model(playground.load()[0], steering=adapter)
    asked = {
        "requests": target_prompts("safety", limit=limit, seed=0),
        "general": general_prompts(limit=limit, seed=0),
    }
    ask = partial(evaluate, tokenizer=tokenizer, max_new_tokens=NEW_TOKENS)
    plain = {name: ask(base, prompts=prompts) for name, prompts in asked.items()}
    config: Any = adapter.config
    lines = [
        f"Layers {', '.join(map(str, config.layers))}, strength {config.strength:.3g}; n = {len(asked['requests'])} "
        f"held-out requests, {len(asked['general'])} general prompts. Unsteered: {plain['requests'].share.brief} refused.",
        "Push: mean w . h of the requests at each layer.",
        "",
        "| share of the strength, what | all read unsteered | cascading | difference, points |",
        "| --- | --- | --- | --- |",
    ]
    for scale in SCALES:
        package = {n: ask(steered, prompts=prompts, adapter="default", scale=scale) for n, prompts in asked.items()}
        code, pushes = {}, {}
        for name, prompts in asked.items():
            with cascade(base, adapter, scale) as found:
                code[name] = ask(base, prompts=prompts)
            pushes[name] = [f"{np.mean(values):.2f}" for values in found]
        refused = [outcome["requests"].hits for outcome in (package, code)]
        same = [
            [a == b for a, b in zip(outcome["general"].answers.ids, plain["general"].answers.ids, strict=True)]
            for outcome in (package, code)
        ]
        for what, (before, after) in (("requests refused", refused), ("general answers unchanged", same)):
            change = paired_difference(before, after)
            lines.append(
                f"| {scale:g}, {what} | {proportion(before).brief} | {proportion(after).brief} | "
                f"{100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}] |"
            )
        score = package["requests"].recorded("score")
        assert score is not None
        lines.append(f"| {scale:g}, push | {score.mean():.2f} on the mean | {', '.join(pushes['requests'])} | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--layer", type=int, default=2, help="of FineSteer's vectors")
    parser.add_argument("--targets", type=int, default=300, help="held-out requests, and as many general prompts")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = ["# Details of the published codes, on the playground", "", "## AlphaSteer: where the query is read", ""]
    text += alphasteer(args.targets)
    print("\n".join(text), flush=True)
    text += [
        "",
        "## FineSteer: the experts' training",
        "",
        f"Block {args.layer}, {args.seeds} seeds: mean held-out R2 against the constant [95% interval over seeds].",
        "",
        "| task, variant | as the paper | as the code | difference | K chosen |",
        "| --- | --- | --- | --- | --- |",
    ]
    model, tokenizer = playground.load()
    for name, rows, split in tasks(model, tokenizer, args.layer, None):
        text += trained(name, rows, split, args.seeds)
        print(text[-2], text[-1], sep="\n", flush=True)
    if args.out is not None:
        args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
