"""Checks for every architecture, each against a plain hook on the same module.

A check of `CHECKS` returns None if it holds, or a sentence that says why there was nothing to check: a property that
the unsteered model lacks, or a missing site. It raises `AssertionError` if steering differs from the plain hook.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from finesteer_hf.errors import SiteError, UnsupportedModelError
from finesteer_hf.model.verbs import SteeringMixin
from finesteer_hf.processors import ConstantVector
from finesteer_hf.sites import Site, SiteKind
from finesteer_hf.testing.architecture_subject import LAYER, Subject, agree, same_bits
from finesteer_hf.testing.probe import Probe, probe_adapter
from finesteer_hf.testing.reference import adding, first_tensor, reading


def check_blocks(subject: Subject) -> str | None:
    """A forward passes the blocks in order, each once, and each takes the stream that the one before returned."""
    calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    handles = [
        block.register_forward_hook(
            lambda m, args, output, index=index: calls.append((index, args[0], first_tensor(output)))
        )
        for index, block in enumerate(subject.blocks)
    ]
    try:
        with torch.no_grad():
            subject.say(subject.ids, max_new_tokens=1)
    finally:
        for handle in handles:
            handle.remove()
    order = [index for index, _, _ in calls]
    assert order == sorted(set(order)), f"the blocks are called in the order {order}"
    for (index, _, output), (_, following, _) in itertools.pairwise(calls):
        assert torch.equal(output, following), f"the block after {index} does not take what block {index} returned"
    skipped = sorted(set(range(len(subject.blocks))) - set(order))
    return f"a text without images skips the blocks {skipped}" if skipped else None


def check_greedy(subject: Subject) -> str | None:
    """A steered batch is bit-identical to a plain hook's, and differs from the unsteered one."""
    steered = subject.say(subject.ids, **subject.constant())
    with adding(subject.blocks[LAYER], subject.vector):
        expected = subject.say(subject.ids)
    assert same_bits(steered, expected), "a batch is not steered as by a plain hook"
    assert not agree(steered, subject.base), "steering changes no logit"
    return None


def check_resid_pre(subject: Subject) -> str | None:
    """A write at a block's input equals that of a plain hook there."""
    steered = subject.say(subject.ids, **subject.constant("resid_pre"))
    with adding(subject.blocks[LAYER], subject.vector, at_input=True):
        expected = subject.say(subject.ids)
    assert same_bits(steered, expected), "a block's input is not steered as by a plain hook"
    assert not agree(steered, subject.base), "steering changes no logit"
    return None


def check_head_out(subject: Subject) -> str | None:
    """A write at the input of each attention output projection equals that of a plain hook there."""
    return _check_projections(subject, "head_out")


def check_mlp_act(subject: Subject) -> str | None:
    """A write at the input of each feed-forward's last projection equals that of a plain hook there."""
    return _check_projections(subject, "mlp_act")


def _check_projections(subject: Subject, kind: SiteKind) -> str | None:
    tower = subject.model._steering.tower
    found, missing = [], ""
    for layer in range(len(subject.blocks)):
        try:
            found.append((Site(kind, layer), tower.projection(Site(kind, layer))))
        except SiteError as error:
            missing = str(error).partition(" has no ")[2].partition(" that is known")[0]
    if not found:
        return f"no {missing}"
    for site, projection in found[:2]:
        vector = torch.randn(tower.width(site), generator=torch.Generator().manual_seed(2)) * 3
        try:
            steered = subject.say(subject.ids, steering_processor=[ConstantVector(site, vector)])
        except UnsupportedModelError:
            return f"refused: {kind} is not [rows, tokens, width]"
        with adding(projection, vector, at_input=True):
            expected = subject.say(subject.ids)
        assert same_bits(steered, expected), f"{site} is not steered as by a plain hook"
        assert not agree(steered, subject.base), f"steering {site} changes no logit"
    return None


def check_left_padding(subject: Subject) -> str | None:
    """A left-padded batch is steered as by a hook that skips pads, and its rows equal the rows alone."""
    batch = subject.say(subject.padded_ids, subject.mask, **subject.constant())
    with adding(subject.blocks[LAYER], subject.vector, mask=subject.mask):
        expected = subject.say(subject.padded_ids, subject.mask)
    assert same_bits(batch, expected), "a padded batch is not steered as by a plain hook"
    if subject.pads_change_the_base:
        return "equal to the plain hook; unsteered, rows differ under padding"
    for index in range(3):
        assert agree(batch.row(index), subject.alone(index, **subject.constant())), f"row {index} differs alone"
    return None


def check_beams(subject: Subject) -> str | None:
    """Beams with several returned sequences equal those of a plain hook."""
    settings: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    try:
        subject.say(subject.ids, **settings)
    except Exception as error:  # any error of the model itself
        return f"unsteered, beams raise {type(error).__name__}"
    steered = subject.say(subject.padded_ids, subject.mask, **settings, **subject.constant())
    with adding(subject.blocks[LAYER], subject.vector, mask=subject.mask):
        expected = subject.say(subject.padded_ids, subject.mask, **settings)
    assert same_bits(steered, expected), "beams are not steered as by a plain hook"
    return None


def check_no_cache(subject: Subject) -> str | None:
    """Without a cache the text equals that of a plain hook, and that with a cache."""
    try:
        base = subject.say(subject.ids, use_cache=False)
    except Exception as error:
        return f"unsteered, use_cache=False raises {type(error).__name__}"
    steered = subject.say(subject.ids, use_cache=False, **subject.constant())
    with adding(subject.blocks[LAYER], subject.vector):
        expected = subject.say(subject.ids, use_cache=False)
    assert same_bits(steered, expected), "without a cache steering differs from a plain hook"
    if not agree(base, subject.base):
        return "equal to the plain hook; unsteered, the cache changes the answer"
    assert agree(steered, subject.say(subject.ids, **subject.constant())), "the cache changes the steered answer"
    return None


def check_query_gate(subject: Subject) -> str | None:
    """A gated vector that depends on the query equals that of a plain hook, also for a row alone."""
    for read in (Site("resid_post", LAYER - 1), Site("resid_post", LAYER)):
        probe = query_probe(subject, read)
        together = subject.say(subject.ids, steering_processor=[probe])
        with query_hook(subject, probe):
            expected = subject.say(subject.ids)
        assert agree(together, expected), f"reading {read}, the answer differs from a plain hook"
        assert not agree(together, subject.base), f"reading {read}, steering changes no logit"
    padded = not subject.pads_change_the_base
    if not padded and subject.batches_change_the_base:
        return "equal to the plain hook; unsteered, rows of a batch differ from the rows alone"
    batch = subject.say(subject.padded_ids, subject.mask, steering_processor=[probe]) if padded else together
    for index in range(3):
        prompt = subject.padded_ids[index, subject.mask[index].bool()] if padded else subject.ids[index]
        single = subject.say(prompt[None], steering_processor=[probe])
        assert agree(batch.row(index), single), f"row {index} has another decision alone"
    return None


def query_probe(subject: Subject, read: Site) -> Probe:
    """A query-dependent probe whose gate is closed for one of the three rows."""
    with reading(subject.blocks[read.layer]) as seen:
        subject.say(subject.ids, max_new_tokens=1)
    probe = probe_adapter(read, subject.site("resid_post"), subject.vector).build()
    assert isinstance(probe, Probe)
    scores = probe.score(seen[0][:, -1]).sort().values
    probe.threshold = float((scores[0] + scores[1]) / 2)
    return probe


@contextlib.contextmanager
def query_hook(subject: Subject, probe: Probe) -> Iterator[None]:
    """The probe as two plain hooks: one keeps the prompt's last state, one adds."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if not kept:
            kept.append(first_tensor(output)[:, -1].detach())

    def delta() -> torch.Tensor:
        vectors, gate = probe.vectors_of(kept[0]), (probe.score(kept[0]) > probe.threshold).float()
        return (vectors * gate[:, None])[:, None]

    handle = subject.blocks[probe.reads[0].layer].register_forward_hook(keep)
    try:
        with adding(subject.blocks[LAYER], delta):
            yield
    finally:
        handle.remove()


def check_status(subject: Subject) -> str | None:
    """A loaded adapter is listed with its sites, and steers like its processor."""
    model, read, write = subject.model, Site("resid_post", LAYER - 1), Site("resid_post", LAYER)
    model.load_steering(probe_adapter(read, write, subject.vector), "probe")
    try:
        status = model.steering_status()
        assert status.active == {"probe": 1.0}, f"active is {status.active}"
        assert status.hooks == (str(read), str(write)), f"hooks are at {status.hooks}"
        assert status.adapters[0].reads == (str(read),) and status.adapters[0].writes == (str(write),), str(status)
        assert not agree(subject.say(subject.ids), subject.base), "a loaded adapter changes no logit"
        off = subject.say(subject.ids, steering=None)
        assert same_bits(off, subject.base), "steering=None is not bit-identical to the base"
    finally:
        model.delete_steering("probe")
    assert not model.steering_status().hooks, "deleting the adapter leaves hooks"
    return None


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "blocks": check_blocks,
    "greedy": check_greedy,
    "resid_pre": check_resid_pre,
    "head_out": check_head_out,
    "mlp_act": check_mlp_act,
    "left padding": check_left_padding,
    "beams": check_beams,
    "no cache": check_no_cache,
    "query gate": check_query_gate,
    "status": check_status,
}


@dataclass(frozen=True)
class Fingerprint:
    """What must be restored when steering is unloaded."""

    model_class: type
    attributes: frozenset[str]
    hooks: tuple[tuple[str, int], ...]
    keys: tuple[str, ...]
    config: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> Fingerprint:
        """Take the fingerprint of a model."""
        # Some models replace modules themselves; only the modules with hooks count.
        counts = ((name, len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in model.named_modules())
        hooks = tuple((name, count) for name, count in counts if count)
        attributes = frozenset(model.__dict__)
        return cls(type(model), attributes, hooks, tuple(model.state_dict()), model.config.to_json_string(False))


def check_unload(subject: Subject, before: Fingerprint) -> None:
    """Unloading restores the base model: its class, hooks, keys, config and outputs, bit-identical."""
    base = subject.base
    subject.model.unload_steering()
    after = Fingerprint.of(subject.model)
    for name in Fingerprint.__dataclass_fields__:
        assert getattr(after, name) == getattr(before, name), f"unloading changes {name}"
    assert not isinstance(subject.model, SteeringMixin), "the class is still a steered one"
    assert same_bits(subject.say(subject.ids), base), "the unloaded model's answer differs"
