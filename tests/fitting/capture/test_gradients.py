"""Gradients of answers against autograd through plain hooks, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting_toys import random_rows, small_model
from teacher_forcing import VECTOR, added, log_probs, of_answer

from finesteer_hf import ConstantVector, SteeredModelForCausalLM
from finesteer_hf.errors import DatasetError, UnsupportedModelError
from finesteer_hf.fitting.capture import gradients
from finesteer_hf.fitting.capture.gradients import GradientReader
from finesteer_hf.fitting.capture.identity import model_identity
from finesteer_hf.fitting.capture.jobs import make_jobs
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.capture.reader import StateReader
from finesteer_hf.fitting.capture.store import ActivationStore
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.fit import capture_gradients, capture_missing
from finesteer_hf.fitting.progress import FitProgress
from finesteer_hf.method_api import CaptureRequest
from finesteer_hf.sites import Site


SITES = (Site("resid_post", 0), Site("resid_pre", 2), Site("head_out", 2), Site("resid_post", 3))


def prompt_cache(model: Any, used: bool = True) -> PromptCache:
    cache = PromptCache(model)
    cache.usable &= used
    return cache


def read(model: Any, answers: Sequence[Passage], sites: Sequence[Site] = SITES, cached: bool = True) -> dict[Any, Any]:
    """By site and answer."""
    reader = GradientReader(model, sites, prompt_cache(model, cached))
    found: dict[Any, np.ndarray] = {}
    for batch in reader.read(answers):
        for (site, pool), values in batch.states.items():
            assert pool == "gradient" and values.dtype == np.float32
            found |= {(site, answer): row for answer, row in zip(batch.answers, values, strict=True)}
    assert {answer for _, answer in found} == set(answers)
    return found


def by_hand(model: Any, answer: Passage, sites: Sequence[Site] = SITES) -> dict[Site, np.ndarray]:
    """The same with a zero vector that a hook adds at each site from the query on."""
    vectors = {site: torch.zeros(32, requires_grad=True) for site in sites}
    moves = {site: added(answer, vector) for site, vector in vectors.items()}
    mean = of_answer(log_probs(model, answer, moves), answer).mean()
    return {
        site: gradient.numpy()
        for site, gradient in zip(sites, torch.autograd.grad(mean, list(vectors.values())), strict=True)
    }


@pytest.fixture
def answers() -> list[Passage]:
    """Answers of several lengths, two per prompt, including one-token prompts, which are run whole."""
    found = [answer for row in random_rows(8) for answer in (row.chosen, row.rejected)]
    found.append(Passage((7, 30, 31), 1))
    assert {min(p.answer_start, 2) for p in found} == {1, 2}
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "mistral", "bloom"])
def test_gradients_at_all_sites_are_autograds_at_each_text(kind: str, answers: list[Passage]) -> None:
    found = read(small_model(kind), answers)
    model = small_model(kind).requires_grad_(False)
    for answer in answers:
        for site, expected in by_hand(model, answer).items():
            np.testing.assert_allclose(
                found[site, answer], expected, rtol=1e-3, atol=1e-5 + 1e-4 * abs(expected).max()
            )


def test_adding_a_site_changes_nothing(answers: list[Passage]) -> None:
    together = read(small_model("llama"), answers)
    for site in SITES:
        for (_, answer), alone in read(small_model("llama"), answers, [site]).items():
            np.testing.assert_allclose(together[site, answer], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [True, False], ids=["kept prompts", "whole texts"])
def test_batches_and_padding_change_nothing(
    cached: bool, answers: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(small_model("llama"), answers, cached=False)
    for tokens in (1, 40, 10_000):
        monkeypatch.setattr(gradients, "GRAPH_TOKENS", tokens)
        for key, values in read(small_model("llama"), answers[::-1], cached=cached).items():
            np.testing.assert_allclose(values, whole[key], rtol=1e-3, atol=1e-5)


def test_answers_of_a_prompt_share_its_pass(answers: list[Passage]) -> None:
    model = small_model("llama")
    cache = PromptCache(model)
    long = [answer for answer in answers if answer.answer_start > 1]
    done: list[int] = []
    for _ in GradientReader(model, SITES, cache).read(long, done.append):
        pass
    assert cache.prompts == len({answer.ids[: answer.answer_start - 1] for answer in long}) < len(long)
    assert sum(done) == len(long)


@pytest.mark.parametrize("trained", [0, 1, 2], ids=["none", "every other", "all"])
def test_parameters_are_as_they_were(trained: int, answers: list[Passage]) -> None:
    model = small_model("llama")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(trained == 2 or (trained == 1 and number % 2 == 0))
    before = [(p.requires_grad, p.detach().clone()) for p in model.parameters()]
    hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    read(model, answers[:4])
    for parameter, (asked, value) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == asked and parameter.grad is None and torch.equal(parameter, value)
    assert [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == hooked
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model, "set_steering")


def test_a_steered_model_is_read_unsteered(answers: list[Passage]) -> None:
    expected = read(small_model("llama"), answers)
    model = SteeredModelForCausalLM.from_model(small_model("llama"))
    with model.steering_with([ConstantVector("resid_post[1]", 5 * VECTOR)]), torch.no_grad():
        ids = torch.tensor([answers[0].ids])
        before = model(input_ids=ids).logits
        found = read(model, answers)
        assert torch.equal(model(input_ids=ids).logits, before)
    for key, values in found.items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_whose_gradients_are_not_finite_are_named(bad: float) -> None:
    model = small_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[58] = bad
    answers = [Passage((5, 6, 7, 8), 2), Passage((5, 6, 58, 9), 2), Passage((5, 6, 9), 2), Passage((9, 6, 58, 9), 2)]
    named: list[Passage] = []

    def describe(passages: Sequence[Passage]) -> str:
        named.extend(passages)
        return "row 1 and row 3"

    reader = GradientReader(model, SITES, PromptCache(model), describe)
    with pytest.raises(DatasetError, match=r"row 1 and row 3: the gradient.*NaN or infinite"):
        list(reader.read(answers))
    assert set(named) == {answers[1], answers[3]}
    assert all(parameter.requires_grad for parameter in model.parameters())
    # The other answers can be read still.
    assert np.isfinite(np.stack(list(read(model, [answers[0], answers[2]]).values()))).all()


def test_a_model_without_gradients_is_reported(answers: list[Passage]) -> None:
    model = small_model("llama")
    model.model.layers[3].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UnsupportedModelError, match="target='difference'"):
        read(model, answers, SITES[:2])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_half_precision_points_the_same_way(answers: list[Passage]) -> None:
    exact, half = read(small_model("llama"), answers), read(small_model("llama").to(torch.bfloat16), answers)
    for key, values in exact.items():
        cosine = float(values @ half[key] / np.linalg.norm(values) / np.linalg.norm(half[key]))
        assert cosine > 0.97, key


class Counted(GradientReader):
    """Records what it was asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[Passage] = []

    def read(self, answers: Sequence[Passage], *args: Any) -> Any:
        self.asked += answers
        return super().read(answers, *args)


def fill(folder: Path | None, rows: list[EncodedRow], sites: Sequence[Site], **settings: Any) -> Any:
    """Read what a folder lacks; returns what was asked for, and the gradients of all rows at all sites."""
    model = small_model("llama")
    with ActivationStore(folder, model_identity(model), **settings) as store:
        reader = Counted(model, sites, PromptCache(model))
        capture_gradients(reader, make_jobs(rows, [Passage((5, 6, 7))]), store, FitProgress(False))
        kept = [store.get((s, "gradient"), [r.chosen for r in rows] + [r.rejected for r in rows]) for s in sites]
    return reader.asked, np.stack(kept)


def test_a_store_asks_only_for_what_it_lacks(tmp_path: Path) -> None:
    rows, sites = random_rows(6), SITES[:1]
    asked, first = fill(tmp_path, rows[:4], sites)
    assert sorted(a.ids for a in asked) == sorted(a.ids for r in rows[:4] for a in (r.chosen, r.rejected))
    asked, again = fill(tmp_path, rows[:4], sites)
    assert asked == [] and np.array_equal(first, again)
    asked, more = fill(tmp_path, rows, sites)
    assert {a.ids for a in asked} == {a.ids for r in rows[4:] for a in (r.chosen, r.rejected)}
    np.testing.assert_array_equal(more[:, :4], first[:, :4])
    asked, other = fill(tmp_path, rows, SITES)
    assert len(asked) == 12 and other.shape == (4, 12, 32)
    asked, fresh = fill(tmp_path, rows, SITES, resume=False)
    assert len(asked) == 12
    np.testing.assert_allclose(fresh, fill(None, rows, SITES)[1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(other, fresh, rtol=1e-3, atol=1e-5)


def test_states_and_gradients_share_a_store(tmp_path: Path) -> None:
    rows, site = random_rows(5), SITES[0]
    model = small_model("llama")
    request = CaptureRequest((site,), ("query", "answer_mean"))
    fill(tmp_path, rows, [site])
    with ActivationStore(tmp_path, model_identity(model)) as store:
        reader = StateReader(model, request)
        count = capture_missing(reader, request, make_jobs(rows), store, FitProgress(False))
        assert count.passes > 0
        assert store.get((site, "query"), [row.prompt for row in rows]).shape == (5, 32)
    asked, _ = fill(tmp_path, rows, [site])
    assert asked == []
