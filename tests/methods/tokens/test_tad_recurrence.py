"""TAD's recurrent confidence: its formula and its two stages written out, and tokens against a plain loop."""

import functools

import numpy as np
import pytest
import torch
from fitted_tad import NEW, N, eager_model, fitted
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.methods.fasb import FASBConfig
from finesteer_hf.methods.tad import TADConfig, confidence_fit, method
from finesteer_hf.methods.tad.confidence_fit import AnswerStates, _state_head, auroc, features, fit_score
from finesteer_hf.methods.tad.recurrence import Recurrence, Weights, unconditional
from finesteer_hf.sites import BACK
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.conformance import fit_on_toy


def by_formula(p, attention, weights, reach):
    """u of one text: the published features, token by token; `attention [tokens, N, weights]`."""
    u = []
    for i, own in enumerate(p):
        if i == 0:
            u.append(own)
            continue
        value = float(weights.bias + weights.own * own)
        for n in range(1, min(reach, i) + 1):
            c, r, s = weights.previous[n - 1].tolist()
            value += float(weights.attention[n - 1] @ attention[i, n - 1]) if attention is not None else 0.0
            value += c * p[i - n] + r * u[i - n] + s * own * u[i - n]
        u.append(min(max(value, 0.0), 1.0))
    return u


def some_weights(size, generator):
    draw = functools.partial(torch.rand, generator=generator)
    return Weights(draw(1) * 0.1, draw(1) * 0.3, draw(N, 3) * 0.15, draw(N, size) * 0.05)


def test_scores_are_those_of_the_formula_and_of_texts_in_pieces():
    generator = torch.Generator().manual_seed(0)
    weights, p = some_weights(4, generator), torch.rand(2, 9, generator=generator)
    attention = torch.rand(2, 9, N, 4, generator=generator)
    judged = torch.ones(2, 9, dtype=torch.bool)
    judged[1, :4] = False
    got = unconditional(p, judged, attention, weights)
    for row, start in ((0, 0), (1, 4)):
        expected = by_formula(p[row, start:].tolist(), attention[row, start:], weights, N)
        np.testing.assert_allclose(got[row, start:], expected, atol=1e-5)
        assert len(set(expected)) > 4
    assert (got[1, :4] == 0).all()
    memory, pieces = Recurrence(N), []
    for first, last in ((0, 5), (5, 6), (6, 9), (7, 9)):
        # The last two columns come again, as those of a draft that was not accepted do.
        columns = slice(first, last)
        past = memory.before(first, p[:, columns])
        pieces.append(unconditional(p[:, columns], judged[:, columns], attention[:, columns], weights, past))
        memory.note(p[:, columns], pieces[-1], judged[:, columns])
    torch.testing.assert_close(torch.cat(pieces[:3], dim=1), got)
    torch.testing.assert_close(pieces[3], got[:, 7:])
    fresh = Recurrence(N).before(5, p[:, :1])
    assert not fresh[2].any()


def planted(rows=40, tokens=8, size=2, seed=0, noise=2.0):
    """Answers whose tokens each say little of their kind, and all together much."""
    rng = np.random.default_rng(seed)
    wanted = np.repeat([True, False], rows)
    states = rng.normal(size=(2 * rows, tokens, 5)) * noise + np.where(wanted, 1.0, -1.0)[:, None, None]
    lengths = rng.integers(4, tokens + 1, size=2 * rows)
    return AnswerStates(
        states=states.astype(np.float32),
        attention=rng.random((2 * rows, tokens, N, size)).astype(np.float32) if size else None,
        real=np.arange(tokens) < lengths[:, None],
        wanted=wanted,
        group=np.tile(np.arange(rows), 2),
    )


def test_the_fit_has_the_two_stages_of_the_published_code(monkeypatch):
    """The code's loops: targets as confidences first, then those of fold models, each on the features of its text."""
    monkeypatch.setattr(confidence_fit, "ALPHAS", (0.1,))
    answers = planted(rows=10)
    got = fit_score(answers, N)
    folds = list(GroupKFold(5).split(answers.group, groups=answers.group))
    own = np.zeros(answers.real.shape)
    for learn, rest in folds:
        weight, bias = _state_head(answers, learn)
        own[rest] = 1 / (1 + np.exp(-(answers.states[rest] @ weight + bias)))

    def row_of(text, i, u):
        row = [own[text, i]]
        for n in range(1, N + 1):
            if n > i:
                row += [0.0] * (answers.attention.shape[-1] + 3)
            else:
                before = np.clip(u[i - n], 0, 1)
                row += [*answers.attention[text, i, n - 1], own[text, i - n], before, own[text, i] * before]
        return row

    def learn_from(confidences, texts):
        tokens = [(t, i) for t in texts for i in range(1, answers.real[t].sum())]
        rows = [row_of(t, i, confidences[t]) for t, i in tokens]
        return Ridge(alpha=0.1).fit(rows, [float(answers.wanted[t]) for t, _ in tokens])

    targets = {t: [float(answers.wanted[t])] * 8 for t in range(20)}
    second = {}
    for learn, rest in folds:
        model = learn_from(targets, learn)
        for text in rest:
            second[text] = [own[text, 0]]
            for i in range(1, answers.real[text].sum()):
                second[text].append(np.clip(model.predict([row_of(text, i, second[text])])[0], 0, 1))
    final = learn_from(second, range(20))
    by_token = final.coef_[1:].reshape(N, -1)
    np.testing.assert_allclose(got.weights.own, final.coef_[:1], atol=1e-4)
    np.testing.assert_allclose(got.weights.attention, by_token[:, :-3], atol=1e-4)
    np.testing.assert_allclose(got.weights.previous, by_token[:, -3:], atol=1e-4)
    np.testing.assert_allclose(got.weights.bias, final.intercept_, atol=1e-4)


def test_a_score_that_remembers_tells_what_single_tokens_do_not():
    fit, held_out = planted(seed=1, noise=4.0), planted(seed=2, noise=4.0)
    score = fit_score(fit, N)
    alone, together = auroc(held_out, score.own(held_out.states)), auroc(held_out, score.score(held_out))
    assert together > alone + 0.05


def test_features_are_zero_before_the_first_token():
    answers = planted(rows=3, size=0)
    own = np.full(answers.real.shape, 0.5)
    found = features(own, own, answers, N)
    assert found.shape == (6, 8, 1 + 3 * N)
    assert (found[:, 0, 1:] == 0).all() and (found[:, 2, 7:] == 0).all() and (found[:, 3, 7:] != 0).all()


def plain_loop(found, prompt, count):
    """Everything computed anew at each step, from the states and the attention that an unsteered prefix would have."""
    model, config, own = eager_model(), found.config, found.tensors
    weights = Weights(
        own["recurrence.bias"], own["recurrence.own"], own["recurrence.previous"], own.get("recurrence.attention")
    )
    text, start = prompt.tolist(), len(prompt) - 1
    doubts = []

    def push(module, args, hidden):
        p = torch.sigmoid(hidden[0] @ own["gate.weight"] + own["gate.bias"])
        attention = None
        if config.attention:
            by_block = [weights_of[block][0].transpose(0, 1) for block in range(2)]
            behind = [[b[i, :, i - n] if i >= n else b.new_zeros(4) for n in range(1, N + 1)] for b in by_block
                      for i in range(len(text))]  # fmt: skip
            attention = torch.tensor(np.array(behind)).view(2, len(text), N, 4).permute(1, 2, 0, 3).flatten(2)[start:]
        u = by_formula(p[start:].tolist(), attention, weights, N)
        doubt = (1 - torch.tensor(u) - own["gate.threshold"]) / own["gate.spread"]
        doubts.append(doubt)
        gate = (doubt > 0).float() if config.gate == "hard" else torch.sigmoid(doubt)
        hidden = hidden.clone()
        hidden[0, start:] += config.strength * gate[:, None] * own["vector"]
        return hidden

    weights_of = {}
    for block, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda m, a, out, at=block: weights_of.__setitem__(at, out[1]))
    model.model.layers[1].register_forward_hook(push)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([text]), use_cache=False).logits[0]
            text.append(int(logits[-1].argmax()))
    return text[len(prompt) :], logits, doubts[-1]


@pytest.mark.parametrize(
    "settings", [{"attention": False}, {}, {"gate": "soft"}], ids=["recurrence", "attention", "soft"]
)
def test_tokens_and_scored_texts_are_those_of_a_plain_loop(settings):
    found = fitted(**settings)
    model = eager_model()
    SteeredModelForCausalLM.from_model(model, steering={"a": found})
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(6, 54, (n,), generator=generator) for n in (5, 8, 3)]
    expected = [plain_loop(found, prompt, NEW) for prompt in prompts]
    bench = Bench(model, prompts, 1.0, [], [])
    assert bench.generate([0, 1, 2], max_new_tokens=NEW) == [tokens for tokens, _, _ in expected]
    assert bench.generate([0, 1, 2], max_new_tokens=NEW, steering=None) != [tokens for tokens, _, _ in expected]
    for prompt, (tokens, logits, doubts) in zip(prompts, expected, strict=True):
        text = torch.cat([prompt, torch.tensor(tokens[:-1])])[None]
        with torch.no_grad():
            got = model(text, prompt_lengths=torch.tensor([len(prompt)])).logits[0]
        torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-4)
        assert len(doubts) == NEW


def test_a_prompt_is_not_run_through_token_by_token(monkeypatch):
    lengths, plain = [], method.unconditional
    monkeypatch.setattr(method, "unconditional", lambda p, *rest: lengths.append(p.shape[1]) or plain(p, *rest))
    model = SteeredModelForCausalLM.from_model(toy_model(), steering={"a": fitted(attention=False)})
    ids = torch.randint(6, 54, (2, 30), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids).index_fill(1, torch.arange(4), 0)
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert lengths == [1, 1, 1]


def test_rows_that_change_places_are_refused():
    model = SteeredModelForCausalLM.from_model(toy_model(), steering={"a": fitted(attention=False)})
    with pytest.raises(ValueError, match="remembers the tokens of each row"):
        model.generate(torch.tensor([[3, 4, 5]]), num_beams=2, max_new_tokens=2)
    back = fit_on_toy(FASBConfig(num_heads=4, backtrack=2, strength=2.0))[2]
    model.load_steering(back, "b")
    model.set_steering(["a", "b"])
    with pytest.raises(ValueError, match="remembers the tokens of each row"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recurrence": BACK + 1}, "recurrence must be from 0 to 10"),
        ({"recurrence": -1}, "recurrence"),
        ({"recurrence": 2, "uncertainty": "entropy"}, "needs uncertainty='answers'"),
        ({"attention": True}, "set their number with `recurrence`"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TADConfig(**settings)


def test_the_paper_s_settings():
    config = TADConfig.paper(layer=3)
    assert (config.recurrence, config.attention, config.uncertainty) == (10, True, "answers")
    assert sorted(fitted().config.requires) == ["attention", "recurrence"]
