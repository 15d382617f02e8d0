"""FASB's loop as in the paper, in plain code: one text, no cache, everything recomputed at each step."""

import contextlib
import functools

import torch

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.methods.fasb import FASBConfig
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.conformance import fit_on_toy
from finesteer_hf.testing.toy import toy_model


NEW = 11
LENGTHS = (7, 4, 9, 5)


@functools.cache
def fitted(**settings):
    return fit_on_toy(FASBConfig(**{"num_heads": 4, "backtrack": 3, "threshold": 0.5, "strength": 8.0, **settings}))[2]


def adapter(**changes):
    """The fitted adapter with settings that need no other fit."""
    base = fitted()
    return SteeringAdapter(type(base.config)(**{**base.config.__dict__, **changes}), base.tensors)


@contextlib.contextmanager
def heads_seen(model, tensors, config, added):
    """Collect the deviations of all positions, and add `added [positions]` times sigma times theta to the heads."""
    deviations = []

    def hook(layer, module, args):
        states = args[0].clone()
        by_head = states.view(*states.shape[:2], 4, -1)
        for row, (at, head) in enumerate(config.heads):
            if at == layer:
                logit = by_head[:, :, head] @ tensors["probes.weight"][row] + tensors["probes.bias"][row]
                deviations.append(1 - torch.sigmoid(logit))
        for row, (at, head) in enumerate(config.heads):
            if at == layer:
                shift = tensors["sigma"][row] * tensors["directions"][row]
                by_head[0, :, head] += torch.tensor(added)[:, None] * shift
        return (states,)

    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(functools.partial(hook, layer))
        for layer, block in enumerate(model.model.layers)
    ]
    try:
        yield deviations
    finally:
        for handle in handles:
            handle.remove()


def reference(model, found, prompt, sample=False, eos=None, gate=1.0):
    """Generate as the paper says, behind a gate. Returns the new tokens, and where and why the text went back first."""
    config, tensors = found.config, found.tensors
    text, added, strength, steered, where = list(prompt), [0.0] * len(prompt), 0.0, False, (-1, None)
    floor = due = 0
    while True:
        now = [a if config.compat is None or i == len(text) - 1 else 0.0 for i, a in enumerate(added)]
        with torch.no_grad(), heads_seen(model, tensors, config, now) as deviations:
            logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
        deviation = float(torch.stack([d[0, -1] for d in deviations]).mean())
        choice = torch.multinomial(logits.softmax(-1)[None], 1) if sample else logits.argmax()
        text.append(int(choice))
        added.append(strength)
        count = len(text) - len(prompt)
        ended = count == NEW or text[-1] == eos
        dose = gate * config.strength * (deviation if config.adaptive else 1.0)
        deviates = gate > 0 and deviation > config.threshold
        if not steered and deviates and (count - floor >= config.backtrack or ended):
            kept = count - config.backtrack if count - floor > config.backtrack else floor
            del text[len(prompt) + kept :], added[len(prompt) + kept :]
            added[-1] = strength = dose
            steered, due = True, kept + config.backtrack
            where = (kept, deviation) if where[0] < 0 else where
            continue
        if ended:
            return text[len(prompt) :], where
        if config.recheck and steered and count >= due:
            added[-1] = strength = dose if deviates else 0.0
            steered, floor, due = deviates, floor if deviates else count, due + config.backtrack


def bench_of(found):
    model = toy_model()
    SteeredModelForCausalLM.from_model(model, steering={"a": found})
    generator = torch.Generator().manual_seed(11)
    return Bench(model, [torch.randint(6, 54, (n,), generator=generator) for n in LENGTHS], 1.0, [], [])


def generate(bench, rows, **kwargs):
    return bench.generate(rows, max_new_tokens=NEW, **kwargs)


ROWS = list(range(len(LENGTHS)))
