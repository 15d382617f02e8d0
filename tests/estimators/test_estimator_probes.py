"""Head probes on planted heads: one separates the classes, the others do not."""

import numpy as np
from sklearn.linear_model import LogisticRegression

from finesteer_hf.estimators.probes import best_heads, centre_directions, fit_head_probes, spread_along


def planted(rows=200, heads=5, size=6, telling=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=rows)
    states = rng.standard_normal((rows, heads, size))
    states[:, telling, 0] += 3.0 * labels
    return states, labels


def test_the_separating_head_is_found_in_the_planted_direction():
    (states, labels), (held_out, truth) = planted(), planted(seed=1)
    probes = fit_head_probes(states, labels, held_out, truth)
    assert best_heads(probes.accuracy, probes.log_loss, 1).tolist() == [3]
    assert probes.accuracy[3] > 0.85 > 0.65 > np.delete(probes.accuracy, 3).max()
    direction = centre_directions(states, labels)[3]
    np.testing.assert_allclose(np.linalg.norm(direction), 1.0)
    assert direction[0] > 0.95


def test_figures_are_those_of_sklearn_and_numpy():
    (states, labels), (held_out, truth) = planted(), planted(seed=1)
    probes = fit_head_probes(states, labels, held_out, truth)
    plain = LogisticRegression(max_iter=1000).fit(states[:, 3], labels)
    assert probes.accuracy[3] == plain.score(held_out[:, 3], truth)
    likelihood = plain.predict_log_proba(held_out[:, 3])[np.arange(len(truth)), truth]
    np.testing.assert_allclose(probes.log_loss[3], -likelihood.mean())
    direction = centre_directions(states, labels)
    np.testing.assert_allclose(spread_along(states, direction)[3], (states[:, 3] @ direction[3]).std())


def test_ties_go_to_the_smaller_loss_then_to_the_earlier_head():
    chosen = best_heads(np.array([0.7, 0.9, 0.9, 0.9]), np.array([0.1, 0.5, 0.3, 0.5]), 3)
    assert chosen.tolist() == [2, 1, 3]
