"""The same checks on this package and on other steering libraries: one vector, one block, one tiny random Llama.

Each cell compares a library with a plain forward hook that adds the same vector in the same setting. `yes`:
token-identical (or, for forwards, equal logits); `no`: runs and differs; `error`: raises; `-`: not offered by the
interface that is wrapped.
Libraries and how to install them: benchmarks/speed/peers.py.

    PYTHONPATH=<checkout of repeng> python -m benchmarks.speed.conformance_peers \\
        --out benchmarks/results/conformance_peers.md
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.peers import available_peers, reference_hook
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.toy import toy_model


LAYER, NEW_TOKENS = 1, 8
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(5)) * 2


def prompts(count: int = 3) -> dict[str, torch.Tensor]:
    return Bench.batch(
        Bench(toy_model(), [torch.arange(7 + i, 14 + 2 * i) for i in range(count)], 1.0, [], []), list(range(count))
    )


def answer(steer: Any, inputs: dict[str, torch.Tensor], model: Any = None, **kwargs: Any) -> list[list[int]]:
    model = toy_model() if model is None else model
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    torch.manual_seed(0)
    with steer(model, [LAYER], VECTOR) as generate:
        out = generate(**inputs, **settings)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def same_tokens(**kwargs: Any) -> Callable[[Any], bool]:
    """Whether a setting of `generate` gives what the plain hook gives."""

    def check(steer: Any) -> bool:
        inputs = prompts()
        if kwargs.get("prompt_lookup_num_tokens"):
            inputs = {name: value[2:3] for name, value in inputs.items()}
        return answer(steer, inputs, **kwargs) == answer(reference_hook, inputs, **kwargs)

    return check


def forward_rows(side: str) -> Callable[[Any], bool]:
    """Whether a batched plain forward, padded on a side, gives each row the logits that it has alone."""

    def check(steer: Any) -> bool:
        model = toy_model()
        rows = [torch.arange(7, 14), torch.arange(9, 13)]
        batch = Bench(model, rows, 1.0, [], []).batch([0, 1], side=side)
        position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            alone = []
            with reference_hook(model, [LAYER], VECTOR):
                alone = [model(input_ids=row[None]).logits[0] for row in rows]
            with steer(model, [LAYER], VECTOR):
                logits = model(**batch, position_ids=position_ids).logits
        for number, row in enumerate(rows):
            own = logits[number, -len(row) :] if side == "left" else logits[number, : len(row)]
            if not torch.allclose(own, alone[number], atol=1e-4):
                return False
        return True

    return check


def lora(steer: Any) -> bool:
    """Whether an unmerged LoRA and steering work together."""
    from peft import LoraConfig, get_peft_model

    def make() -> Any:
        torch.manual_seed(1)
        return get_peft_model(toy_model(), LoraConfig(r=4, init_lora_weights=False)).get_base_model()

    inputs = prompts()
    return answer(steer, inputs, make()) == answer(reference_hook, inputs, make())


def other_threads(steer: Any) -> bool:
    """Whether a thread that does not steer gets an unsteered answer while another steers on the same model."""
    model, inputs = toy_model(), prompts()
    plain = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False).tolist()
    seen: list[Any] = []
    with steer(model, [LAYER], VECTOR):
        thread = threading.Thread(
            target=lambda: seen.append(model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False).tolist())
        )
        thread.start()
        thread.join()
    return seen == [plain]


def foreign_hooks(steer: Any) -> bool:
    """Whether somebody else's hook is still there afterwards, and the model is as it was."""
    model, inputs, calls = toy_model(), prompts(), []
    names = list(model.state_dict())
    handle = model.model.layers[0].register_forward_hook(lambda m, a, o: calls.append(1))
    base = model.generate(**inputs, max_new_tokens=2, do_sample=False).tolist()
    answer(steer, inputs, model)
    calls.clear()
    again = model.generate(**inputs, max_new_tokens=2, do_sample=False).tolist()
    handle.remove()
    return bool(calls) and again == base and list(model.state_dict()) == names


def saved_names(steer: Any) -> bool:
    """Whether the state dict shows the base model's names while steering is on."""
    model = toy_model()
    names = list(model.state_dict())
    with steer(model, [LAYER], VECTOR):
        return list(model.state_dict()) == names


CHECKS: dict[str, Callable[[Any], bool]] = {
    "greedy batch, left-padded": same_tokens(),
    "beams, two returned": same_tokens(num_beams=3, num_return_sequences=2),
    "sampling, three returned": same_tokens(do_sample=True, num_return_sequences=3),
    "static cache": same_tokens(cache_implementation="static", disable_compile=True),
    "no cache": same_tokens(use_cache=False),
    "chunked prefill": same_tokens(prefill_chunk_size=3),
    "prompt lookup": same_tokens(prompt_lookup_num_tokens=3),
    "guidance": same_tokens(guidance_scale=1.5),
    "forward, left-padded": forward_rows("left"),
    "forward, right-padded": forward_rows("right"),
    "unmerged LoRA": lora,
    "other threads unsteered": other_threads,
    "foreign hooks and model intact": foreign_hooks,
    "state dict names while steering": saved_names,
}


# Their interface wraps `generate`; a plain forward of the model is another call there, or another object.
ONLY_GENERATE = {"pyvene", "nnsight"}


def run(name: str, peer: str, steer: Any) -> str:
    if name.startswith("forward") and peer in ONLY_GENERATE:
        return "-"
    check = CHECKS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "yes" if check(steer) else "no"
    except Exception as error:  # a library's failure is a finding here, whatever its type
        return f"error: {type(error).__name__}"


def installed(name: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return f"{name} {version(name)}"
    return f"{name} (checkout)" if name not in ("plain hook",) else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    peers = available_peers()
    lines = [
        "| check | " + " | ".join(installed(name) for name in peers) + " |",
        "|---" * (len(peers) + 1) + "|",
    ]
    for name in CHECKS:
        lines.append(f"| {name} | " + " | ".join(run(name, peer, steer) for peer, steer in peers.items()) + " |")
        print(lines[-1], flush=True)
    text = (
        "\n".join(lines) + f"\n\ntorch {version('torch')}, transformers {version('transformers')}, one CPU thread.\n"
    )
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
