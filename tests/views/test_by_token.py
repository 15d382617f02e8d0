"""Shares by token are those of plain hooks, on texts alone and in padded batches, and exactly 0 where nothing is added."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AutoTokenizer

from finesteer_hf import ConstantVector, Decision, SteeringProcessor
from finesteer_hf.adapters.base_models import located
from finesteer_hf.errors import AdapterNotFoundError
from finesteer_hf.sites import Site
from finesteer_hf.testing.probe import probe_adapter
from finesteer_hf.testing.toy import toy_model
from finesteer_hf.views.by_token import steering_by_token
from finesteer_hf.views.token_text import token_texts


EARLY, SITE, LATE = (Site("resid_post", layer) for layer in range(3))
VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(5)) * 2
PROMPT = torch.randint(6, 54, (9,), generator=torch.Generator().manual_seed(0)).tolist()
ANSWER = torch.randint(6, 54, (6,), generator=torch.Generator().manual_seed(1)).tolist()


@contextlib.contextmanager
def plain_hook(model, layer, change):
    """Change a block's output by hand and collect |delta| / |h| of every token, `[rows, tokens]` for each call."""
    shares = []

    def hook(module, args, output):
        delta = change(output) - output
        shares.append(delta.norm(dim=-1) / output.norm(dim=-1))
        return output + delta

    handle = model.model.layers[layer].register_forward_hook(hook)
    try:
        yield shares
    finally:
        handle.remove()


def columns(positions, query, tokens):
    return {"all": (0, tokens), "prompt": (0, query + 1), "generated": (query, tokens)}[positions]


@torch.no_grad()
def by_hand(ids, positions, query, mask=None, vector=VECTOR):
    """Shares of a vector at `SITE`, from a plain model."""
    base, (first, last) = toy_model(), columns(positions, query, ids.shape[1])
    steered = torch.zeros(ids.shape[1], 1)
    steered[first:last] = 1
    with plain_hook(base, SITE.layer, lambda hidden: hidden + steered * vector) as shares:
        base(input_ids=ids, attention_mask=mask)
    return shares[0]


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_shares_are_those_of_a_plain_hook(model, tokenizer, positions):
    with model.steering_with([ConstantVector(SITE, VECTOR, positions=positions)]):
        seen = steering_by_token(model, tokenizer, PROMPT, answer=ANSWER)
    want = by_hand(torch.tensor([[*PROMPT, *ANSWER]]), positions, len(PROMPT) - 1)[0]
    assert seen.sites == (SITE,) and seen.query == 8 and seen.ids == (*PROMPT, *ANSWER)
    torch.testing.assert_close(seen.shares[:, 0], want, rtol=1e-4, atol=1e-6)
    first, last = columns(positions, 8, 15)
    assert seen.largest[first:last].min() > 0
    assert not seen.largest[:first].any() and not seen.largest[last:].any()


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_a_row_of_a_padded_batch_is_steered_as_it_is_shown(model, tokenizer, positions):
    """A plain hook on a left-padded batch; and a prompt that comes with its pads."""
    short, pads = PROMPT[:5], 4
    ids = torch.tensor([[*PROMPT, *ANSWER], [*[0] * pads, *short, *ANSWER]])
    want = by_hand(ids, positions, len(PROMPT) - 1, mask=(ids != 0).long())
    batch = {"input_ids": torch.tensor([[*[0] * pads, *short]]), "attention_mask": torch.tensor([[0] * 4 + [1] * 5])}
    with model.steering_with([ConstantVector(SITE, VECTOR, positions=positions)]):
        for prompt, row, start in ((PROMPT, 0, 0), (short, 1, pads), (batch, 1, pads)):
            seen = steering_by_token(model, tokenizer, prompt, answer=ANSWER)
            torch.testing.assert_close(seen.shares[:, 0], want[row, start:], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def unsteered_state(ids, layer):
    return toy_model()(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0, -1]


@torch.no_grad()
def test_a_stack_of_adapters_is_seen_at_each_site(model, tokenizer):
    """Two adapters at one site and one later, each decided from the unsteered query, with scales of their own."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    for name, read, write in (("a", EARLY, SITE), ("b", SITE, SITE), ("c", SITE, EARLY)):
        model.load_steering(probe_adapter(read, write, direction), name)
    scales = {"a": 1.0, "b": -0.5, "c": 2.0}
    seen = steering_by_token(model, tokenizer, PROMPT, answer=ANSWER, steering=scales, steering_scale=1.5)

    def vector(layer):
        state = unsteered_state(PROMPT, layer)
        return torch.nn.functional.normalize(state, dim=-1).roll(1) * direction.norm()

    first, second = 3.0 * vector(SITE.layer), 1.5 * vector(EARLY.layer) - 0.75 * vector(SITE.layer)
    base = toy_model()
    with (
        plain_hook(base, EARLY.layer, lambda hidden: hidden + first) as early,
        plain_hook(base, SITE.layer, lambda hidden: hidden + second) as late,
    ):
        base(input_ids=torch.tensor([[*PROMPT, *ANSWER]]))
    assert seen.sites == (EARLY, SITE)
    want = torch.stack([early[0][0], late[0][0]], dim=1)
    torch.testing.assert_close(seen.shares, want, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(seen.largest, want.max(dim=1).values, rtol=1e-3, atol=1e-5)
    assert [(r.name, r.scale, r.gate) for r in seen.adapters] == [("a", 1.5, 1.0), ("b", -0.75, 1.0), ("c", 3.0, 1.0)]
    cosine = torch.nn.functional.cosine_similarity(unsteered_state(PROMPT, 0), direction, dim=0)
    assert seen.adapters[0].score == pytest.approx(float(cosine), abs=1e-5)


class Halve(SteeringProcessor):
    """A map: half of each state, on the tokens that `positions` selects."""

    maps = (SITE,)

    def __init__(self, positions):
        self.positions = positions

    def transform(self, site, hidden, view):
        changed = hidden * (1 - view.scale / 2)
        return changed if view.mask is None else torch.where(view.mask[..., None], changed, hidden)


@pytest.mark.parametrize(("positions", "first", "last"), [("all", 0, 15), ("prompt", 0, 9), ("generated", 8, 15)])
def test_maps_are_seen_like_vectors(model, tokenizer, positions, first, last):
    with model.steering_with([Halve(positions)]):
        seen = steering_by_token(model, tokenizer, PROMPT, answer=ANSWER)
    want = torch.zeros(15)
    want[first:last] = 0.5
    torch.testing.assert_close(seen.shares[:, 0], want)
    assert seen.adapters[0].gate is None


class Shut(ConstantVector):
    def decide(self, queries):
        return Decision({self.site: self.vector[None]}, torch.zeros(queries.rows), {"score": torch.ones(queries.rows)})


def test_a_shut_gate_gives_exact_zeros(model, tokenizer):
    with model.steering_with([Shut(SITE, VECTOR), Shut(LATE, VECTOR, positions="generated")]):
        seen = steering_by_token(model, tokenizer, PROMPT, answer=ANSWER)
        assert steering_by_token(model, tokenizer, PROMPT, answer=ANSWER, steering_scale=0.0).sites == ()
    assert torch.equal(seen.shares, torch.zeros(15, 2))
    assert [reading.gate for reading in seen.adapters] == [0.0, 0.0]
    unsteered = steering_by_token(model, tokenizer, PROMPT, answer=ANSWER, steering=None)
    assert unsteered.adapters == () and torch.equal(unsteered.largest, torch.zeros(15))
    assert "added nothing at any of the 15 tokens" in unsteered.describe()


def test_an_answer_of_its_own_is_that_of_generate_with_its_shares(model, tokenizer):
    """The deltas of a cached, greedy `generate`, step by step, are those that are shown."""
    processors = [ConstantVector(SITE, VECTOR)]
    base, ids = toy_model(), torch.tensor([PROMPT])
    with plain_hook(base, SITE.layer, lambda hidden: hidden + VECTOR) as steps:
        said = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    with model.steering_with(processors):
        seen = steering_by_token(model, tokenizer, PROMPT, max_new_tokens=5)
    assert list(seen.ids) == said[0].tolist() and len(seen.tokens) == 14
    run = torch.cat([share[0] for share in steps])
    # The last token of an answer does not go through the model again in `generate`.
    torch.testing.assert_close(seen.shares[: len(run), 0], run, rtol=1e-3, atol=1e-5)


def test_text_chats_and_ids_are_the_same_prompt(model, tokenizer):
    chat = [{"role": "user", "content": "sun1 sea2"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    with model.steering_with([ConstantVector(SITE, VECTOR)]):
        views = [
            steering_by_token(model, tokenizer, prompt, answer=answer)
            for prompt in (chat, ids, torch.tensor([ids]), tokenizer.decode(ids))
            for answer in ("oak3 fox4", tokenizer.convert_tokens_to_ids(["oak3", "fox4"]))
        ]
    assert len({seen.ids for seen in views}) == 1
    assert views[0].prompt_length == len(ids) and "".join(views[0].tokens) == tokenizer.decode(views[0].ids)
    assert views[0].to_dict()["tokens"][-1]["part"] == "answer"


def test_what_cannot_be_shown_is_refused(model, tokenizer):
    with pytest.raises(TypeError, match="LlamaForCausalLM is not steered"):
        steering_by_token(toy_model(), tokenizer, PROMPT)
    with pytest.raises(ValueError, match="2 rows; look at one"):
        steering_by_token(model, tokenizer, torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="no token"):
        steering_by_token(model, tokenizer, [])
    with pytest.raises(TypeError, match="text, a chat, or token ids"):
        steering_by_token(model, tokenizer, object())
    with pytest.raises(AdapterNotFoundError, match="nobody"):
        steering_by_token(model, tokenizer, PROMPT, steering="nobody")


def test_nothing_stays_on_the_model(model, tokenizer):
    hooks = len(model.model.layers[1]._forward_hooks)
    with model.steering_with([ConstantVector(SITE, VECTOR)]):
        steering_by_token(model, tokenizer, PROMPT, answer=ANSWER)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, toy_model()(input_ids=ids).logits)
    assert len(model.model.layers[1]._forward_hooks) == hooks


def test_token_texts_join_to_the_text_also_where_a_character_spans_tokens():
    tokenizer = AutoTokenizer.from_pretrained(located("playground"))
    for text in ("Old books say it.", "naïve 😀 日本語\n\n  two", "€"):
        ids = tokenizer(text)["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
        assert not any("\ufffd" in one for one in texts)
