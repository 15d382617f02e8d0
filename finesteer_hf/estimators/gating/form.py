"""How well the form of prompts alone predicts their class: a probe on surface features, without a model.

A linear gate learns the first thing that separates its two classes. If the prompts to steer are commands and the
general ones are questions, it separates commands from questions, and every figure on such prompts looks perfect. This
probe sees only the form, so what it separates needs no meaning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.validation import check_is_fitted

from finesteer_hf.estimators.selection import make_folds


# Share of a class that must begin or end with a word for the word to count as form, not content.
FREQUENT = 0.05
# Quantiles of each class at which lengths are cut.
LENGTH_QUANTILES = (0.2, 0.4, 0.6, 0.8)
# Smallest difference between the classes that is reported, and most lines.
TELLING, MOST_TOLD = 0.3, 3
# Floor of a prompt's weight, beside an overlap of at most 1: if form separates the classes completely, all prompts
# weigh about the same, and the few in between do not decide alone.
LEAST_WEIGHT = 0.1
# Rows used of each class; more do not change the reported figures.
MOST_ROWS = 2000

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Statement:
    """A yes/no statement about a text.

    Attributes:
        family: group of similar statements; one of each is reported.
        text: completes "96% of the prompts ...".
        negated: the opposite.
        holds: whether it is true of a text.
    """

    family: str
    text: str
    negated: str
    holds: Callable[[str], bool]


_FIXED = (
    Statement("end", "end with '?'", "end without '?'", lambda text: text.rstrip().endswith("?")),
    Statement("end", "end with '.'", "end without '.'", lambda text: text.rstrip().endswith(".")),
    Statement(
        "end",
        "end with a letter or digit",
        "end with a punctuation mark",
        lambda text: text.rstrip()[-1:].isalnum(),
    ),
    Statement("lines", "have several lines", "have one line", lambda text: "\n" in text.strip()),
    Statement("case", "begin with a capital", "begin without a capital", lambda text: text.lstrip()[:1].isupper()),
    Statement("capitals", "have a word in capitals", "have no word in capitals", lambda text: _in_capitals(text)),
    Statement("digits", "hold a digit", "hold no digit", lambda text: any(letter.isdigit() for letter in text)),
    Statement("comma", "hold a comma", "hold no comma", lambda text: "," in text),
    Statement("colon", "hold a colon", "hold no colon", lambda text: ":" in text),
    Statement("quotes", "hold quotes", "hold no quotes", lambda text: any(mark in text for mark in '"“”`')),
    Statement("brackets", "hold brackets", "hold no brackets", lambda text: any(mark in text for mark in "()[]{}<>")),
    Statement(
        "sentences", "have several sentences", "have one sentence", lambda text: bool(re.search(r"[.?!]\s+\S", text))
    ),
)


def _in_capitals(text: str) -> bool:
    return any(len(word) > 2 and word.isupper() for word in _WORD.findall(text))


def _words(text: str) -> int:
    return len(text.split())


def first_word(text: str) -> str:
    """The first word, lower case; empty if there is none."""
    found = _WORD.search(text)
    return found.group().lower() if found else ""


def last_word(text: str) -> str:
    """The last word, lower case; empty if there is none."""
    found = _WORD.findall(text[-200:])
    return found[-1].lower() if found else ""


class FormFeatures(TransformerMixin, BaseEstimator):
    """Texts as yes/no statements about their form: first and last word, ending, length, lines, case, punctuation.

    Words count as form if many texts of a class begin or end with them, as with wrappers. Lengths are cut at quantiles
    of each class, so that medium lengths can separate the classes too.

    Attributes:
        statements_: the statement of each column.
    """

    def fit(self, texts: Sequence[str], truth: Any) -> FormFeatures:
        """Find the frequent words and lengths of texts `[rows]` with classes `truth` `[rows]`."""
        classes = [
            [text for text, own in zip(texts, truth, strict=True) if own == label] for label in np.unique(truth)
        ]
        found = list(_FIXED)
        for family, verb, word_of in (("first word", "begin", first_word), ("last word", "end", last_word)):
            words = {word for rows in classes for word in _frequent(map(word_of, rows), len(rows))}
            found += [_of_word(family, verb, word, word_of) for word in sorted(words)]
        for unit, length in (("words", _words), ("characters", len)):
            cuts = {
                int(cut) for rows in classes for cut in np.quantile([length(row) for row in rows], LENGTH_QUANTILES)
            }
            found += [_longer(unit, cut, length) for cut in sorted(cuts)]
        self.statements_ = found
        return self

    def transform(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return 1 where a statement holds, `[rows, statements]`."""
        check_is_fitted(self)
        return np.array(
            [[statement.holds(text) for statement in self.statements_] for text in texts], dtype=np.float64
        )


def _frequent(words: Any, rows: int) -> list[str]:
    return [word for word, count in Counter(words).items() if word and count >= max(2, FREQUENT * rows)]


def _of_word(family: str, verb: str, word: str, word_of: Callable[[str], str]) -> Statement:
    return Statement(
        family,
        f"{verb} with the word {word!r}",
        f"do not {verb} with the word {word!r}",
        lambda text: word_of(text) == word,
    )


def _longer(unit: str, cut: int, length: Callable[[str], int]) -> Statement:
    return Statement(
        unit, f"have more than {cut} {unit}", f"have at most {cut} {unit}", lambda text: length(text) > cut
    )


class FormProbe(BaseEstimator):
    """A logistic regression of intervention-required against general prompts on their form alone.

    Args:
        folds, seed: those of the cross-validation.

    Attributes:
        auroc_: cross-validated.
        ir_odds_: cross-validated log-odds of the IR prompts, `[rows]`.
        telling_: the statements whose shares differ most, one dict each: statement, prompts, general (shares).
    """

    def __init__(self, *, folds: int = 5, seed: int = 0) -> None:
        self.folds = folds
        self.seed = seed

    def fit(self, ir: Sequence[str], general: Sequence[str], groups: Any = None) -> FormProbe:
        """Learn from texts of both classes, at least two each.

        Args:
            ir: prompts to steer.
            general: prompts not to steer.
            groups: `[len(ir)]` kinds of the prompts, kept together in folds: a word that one kind begins with is not
                the form of all.
        """
        own, labels = _draw(list(ir), None if groups is None else np.asarray(groups), self.seed)
        others, _ = _draw(list(general), None, self.seed)
        if labels is not None and len(np.unique(labels)) < 2:
            labels = None
        texts, truth = [*own, *others], np.repeat([1, 0], [len(own), len(others)])
        folds = min(self.folds, len(own) if labels is None else len(np.unique(labels)), len(others))
        parts = [
            tuple(np.concatenate([left, right + len(own)]) for left, right in zip(first, second, strict=True))
            for first, second in zip(
                make_folds(len(own), folds, labels, self.seed),
                make_folds(len(others), folds, None, self.seed),
                strict=True,
            )
        ]
        self.model_ = _pipeline()
        odds = cross_val_predict(self.model_, texts, truth, cv=parts, method="decision_function")
        self.auroc_ = float(roc_auc_score(truth, odds))
        self.ir_odds_ = odds[: len(own)]
        self.model_.fit(texts, truth)
        self.telling_ = _telling(self.model_[0], texts, truth)
        return self

    def score_samples(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the log-odds of texts, `[rows]`; higher is more like the IR prompts' form."""
        check_is_fitted(self)
        return np.asarray(self.model_.decision_function(list(texts))) if len(texts) else np.zeros(0)

    def overlap_weights(
        self, ir: Sequence[str], general: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return weights `[rows]` of both classes' prompts, with mean 1 each, that make their forms more alike.

        A prompt's weight is the probability of the other class given its form (overlap weights; Li, Morgan and
        Zaslavsky 2018), plus a tenth. So prompts that their form gives away count less.
        """
        own = LEAST_WEIGHT + expit(-self.score_samples(ir))
        others = LEAST_WEIGHT + expit(self.score_samples(general))
        return own / own.mean(), others / others.mean()

    def describe(self, most: int = MOST_TOLD) -> str:
        """Describe the strongest differences in words, in at most `most` statements."""
        said = "; ".join(
            f"{row['prompts']:.0%} of the prompts {row['statement']}, {row['general']:.0%} of the general ones"
            for row in self.telling_[:most]
        )
        return said or "no single property of the form separates them well"

    def same_form(self, texts: Sequence[str], epsilon: float) -> NDArray[np.bool_]:
        """Return which texts `[rows]` have the form of IR prompts.

        They are those on which a gate on form alone fires, if it misses at most a share `epsilon` of the IR prompts.
        Only its behaviour on these shows whether another gate reads more than the form.
        """
        return self.score_samples(texts) >= np.quantile(self.ir_odds_, epsilon, method="lower")


def _pipeline() -> Pipeline:
    return make_pipeline(FormFeatures(), LogisticRegression(class_weight="balanced", max_iter=1000))


def _draw(texts: list[str], labels: NDArray[Any] | None, seed: int) -> tuple[list[str], NDArray[Any] | None]:
    if len(texts) <= MOST_ROWS:
        return texts, labels
    kept = np.random.default_rng(seed).choice(len(texts), MOST_ROWS, replace=False)
    return [texts[i] for i in kept], None if labels is None else labels[kept]


def _telling(features: FormFeatures, texts: Sequence[str], truth: NDArray[Any]) -> list[dict[str, Any]]:
    """The statement of each family whose shares differ most, largest difference first."""
    holds = features.transform(texts)
    own, others = holds[truth == 1].mean(axis=0), holds[truth == 0].mean(axis=0)
    best: dict[str, int] = {}
    for place in np.argsort(-np.abs(own - others), kind="stable"):
        best.setdefault(features.statements_[place].family, int(place))
    rows = []
    for place in best.values():
        statement, a, b = features.statements_[place], float(own[place]), float(others[place])
        # Worded for the prompts to steer: the variant that holds for most of them, but words are never negated.
        as_is = a >= b or statement.family.endswith("word")
        said = (statement.text, a, b) if as_is else (statement.negated, 1 - a, 1 - b)
        if abs(a - b) >= TELLING:
            rows.append(dict(zip(("statement", "prompts", "general"), said, strict=True)))
    return rows[:MOST_TOLD]
