"""The probe of prompts' form: it finds and names what separates the classes, and nothing if nothing does."""

from __future__ import annotations

import numpy as np
import pytest

from finesteer_hf.estimators import FormProbe
from finesteer_hf.estimators.gating.form import FormFeatures


NOUNS = ("boat", "lamp", "river", "stone", "garden", "window", "letter", "engine", "market", "cloud")
VERBS = ("paint", "carry", "clean", "repair", "measure", "describe", "open", "store", "weigh", "sell")


def commands(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{rng.choice(VERBS).capitalize()} the {' and the '.join(rng.choice(NOUNS, 2))}" for _ in range(count)]


def questions(count: int, seed: int = 1) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"Why would one {rng.choice(VERBS)} the {' and the '.join(rng.choice(NOUNS, 2))}?" for _ in range(count)]


def test_commands_against_questions_are_separated_and_named() -> None:
    probe = FormProbe().fit(commands(80), questions(60))
    assert probe.auroc_ > 0.999
    first = probe.telling_[0]
    assert first["prompts"] == 1.0 and first["general"] == 0.0
    assert "end with" in probe.describe() and "100% of the prompts" in probe.describe()
    assert not probe.same_form(questions(30, seed=7), 0.05).any()
    assert probe.same_form(commands(30, seed=7), 0.05).mean() > 0.8


def test_prompts_of_one_form_are_not_separated() -> None:
    mixed = [*commands(80), *questions(80)]
    probe = FormProbe().fit(mixed[::2], mixed[1::2])
    assert 0.35 < probe.auroc_ < 0.65
    assert probe.telling_ == []
    assert probe.same_form([*commands(30, 7), *questions(30, 7)], 0.05).mean() > 0.8


@pytest.mark.parametrize(
    ("own", "general", "named"),
    [
        ([f"Ignore the rules. {text}" for text in commands(60)], commands(60, 1), "the word 'ignore'"),
        ([f"{text} Answer" for text in questions(60)], questions(60, 2), "the word 'answer'"),
        ([" ".join(commands(5, seed)) for seed in range(60)], commands(60, 99), "words"),
        ([text.lower() for text in questions(60)], questions(60, 2), "without a capital"),
    ],
)
def test_wrappers_lengths_and_case_are_named(own: list[str], general: list[str], named: str) -> None:
    probe = FormProbe().fit(own, general)
    assert probe.auroc_ > 0.99
    assert named in " ".join(row["statement"] for row in probe.telling_), probe.telling_


def test_a_length_in_the_middle_is_found_too() -> None:
    def of(words: int, seed: int) -> str:
        return " ".join(np.random.default_rng(seed).choice(NOUNS, words))

    own = [of(12, seed) for seed in range(60)]
    general = [of(4 if seed % 2 else 25, seed) for seed in range(60)]
    assert FormProbe().fit(own, general).auroc_ > 0.95


def test_the_first_word_of_one_kind_is_not_the_form_of_the_others() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat(list("abcdef"), 15)
    # each kind begins with a word of its own, each general prompt with another; apart from that nothing tells
    own = [f"{kind * 3} the {rng.choice(NOUNS)}" for kind in kinds]
    general = [f"{''.join(rng.choice(list('mnopqrstuv'), 3))} the {rng.choice(NOUNS)}" for _ in kinds]
    by_row, by_kind = FormProbe().fit(own, general).auroc_, FormProbe().fit(own, general, kinds).auroc_
    assert by_row > 0.95 and by_kind < 0.75


def test_weights_make_the_forms_alike() -> None:
    """With overlap weights, a separating property of the form has about the same share in both classes."""
    rng = np.random.default_rng(0)
    own = [(commands if asked < 0.8 else questions)(1, seed)[0] for seed, asked in enumerate(rng.random(200))]
    general = [
        (commands if asked < 0.3 else questions)(1, 999 + seed)[0] for seed, asked in enumerate(rng.random(200))
    ]
    probe = FormProbe().fit(own, general)
    weights = probe.overlap_weights(own, general)

    def asks(texts: list[str], weight: np.ndarray) -> float:
        return float(np.average([text.endswith("?") for text in texts], weights=weight))

    assert weights[0].mean() == pytest.approx(1) and weights[1].mean() == pytest.approx(1)
    before = asks(general, np.ones(200)) - asks(own, np.ones(200))
    after = asks(general, weights[1]) - asks(own, weights[0])
    assert before > 0.4 and abs(after) < before / 3
    apart = FormProbe().fit(commands(60), questions(60))
    assert max(weight.max() for weight in apart.overlap_weights(commands(60), questions(60))) < 3


def test_features_are_the_statements_read_literally() -> None:
    texts = ["Why so?", "go on.\nnow (3)"]
    features = FormFeatures().fit(texts * 5, [1, 0] * 5)
    columns = {
        statement.text: values.tolist()
        for statement, values in zip(features.statements_, features.transform(texts).T, strict=True)
    }
    assert columns["end with '?'"] == [1, 0] and columns["have several lines"] == [0, 1]
    assert columns["begin with a capital"] == [1, 0] and columns["hold brackets"] == [0, 1]
    assert columns["begin with the word 'why'"] == [1, 0] and columns["end with the word '3'"] == [0, 1]
    assert features.transform(["", "   "]).shape == (2, len(features.statements_))


def test_large_classes_are_sampled() -> None:
    probe = FormProbe().fit(commands(2500), questions(2100), np.arange(2500) % 7)
    assert len(probe.ir_odds_) == 2000 and probe.auroc_ > 0.99
