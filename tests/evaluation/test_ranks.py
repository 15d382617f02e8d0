"""Ranks with intervals on planted data."""

from __future__ import annotations

import numpy as np
import pytest

from finesteer_hf.evaluation.measures.ranks import ranks_with_intervals


def planted(n: int = 300) -> dict[str, np.ndarray]:
    """A clear best, two that differ only by chance, and a clear last."""
    generator = np.random.default_rng(0)
    shares = {"last": 0.1, "middle a": 0.5, "best": 0.9, "middle b": 0.5}
    return {name: generator.random(n) < share for name, share in shares.items()}


def test_clear_ranks_are_separated_and_equal_ones_are_not() -> None:
    found = ranks_with_intervals(planted())
    assert list(found) == ["last", "middle a", "best", "middle b"]
    assert (found["best"].value, found["best"].low, found["best"].high) == (1, 1, 1)
    assert (found["last"].value, found["last"].low, found["last"].high, found["last"].n) == (4, 4, 4, 300)
    for name in ("middle a", "middle b"):
        assert (found[name].low, found[name].high) == (2, 3)
    assert str(found["best"]) == "1 [1, 1]"


def test_methods_with_the_same_answers_share_their_places() -> None:
    scores = planted(60)
    found = ranks_with_intervals({"one": scores["best"], "two": scores["best"], "other": scores["last"]})
    assert (found["one"].value, found["one"].low, found["one"].high) == (1.5, 1, 2) and found["one"] == found["two"]


def test_an_interval_equals_a_bootstrap_loop() -> None:
    generator = np.random.default_rng(4)
    scores = {name: generator.normal(shift, 1, 40) for name, shift in (("a", 0.0), ("b", 0.2), ("c", 0.4))}
    ranks = []
    for _ in range(4000):
        drawn = generator.integers(0, 40, 40)
        means = {name: row[drawn].mean() for name, row in scores.items()}
        ranks.append(1 + sum(means[other] > means["b"] for other in means))
    found = ranks_with_intervals(scores)["b"]
    assert (found.low, found.high) == tuple(np.quantile(ranks, (0.025, 0.975), method="inverted_cdf"))
    assert found == ranks_with_intervals(scores)["b"]


def test_shared_difficulty_does_not_widen_ranks() -> None:
    """One method is a little better on every item, while items differ far more than methods."""
    items = np.random.default_rng(0).normal(0, 10, 30)
    found = ranks_with_intervals({"a": items, "b": items + 0.01})
    assert (found["b"].low, found["b"].high) == (1, 1)


def test_unusable_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="same items"):
        ranks_with_intervals({"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(ValueError, match="same items"):
        ranks_with_intervals({"a": []})
    with pytest.raises(ValueError, match="scores; those of b"):
        ranks_with_intervals({"a": [1.0], "b": [float("nan")]})
