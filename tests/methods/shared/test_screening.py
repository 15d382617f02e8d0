"""First-order gains against the effect of small doses, measured with plain hooks on one text at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from kept_data import kept_data
from planted import PlantedData
from teacher_forcing import added, log_probs, of_answer

from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.methods._shared.screening import (
    SCREEN_DOSE,
    first_order_gain,
    preference_gradients,
    rank_agreement,
    relative_norm,
    state_norms,
)
from finesteer_hf.sites import Site
from finesteer_hf.testing import toy_model


NAMES = ("resid_post[0]", "resid_post[1]", "resid_pre[2]")
SITES = tuple(map(Site.parse, NAMES))


def rates(text: str, vectors: Mapping[Site, np.ndarray], factor: float) -> np.ndarray:
    """Log-probabilities a token of the validation rows' answers, `[rows]`, under so much of the vectors."""
    data, model = kept_data(*NAMES), toy_model()
    found = []
    prompts = data.tokens("prompt", "validation")
    for row, (prompt, answer) in enumerate(zip(prompts, data.tokens(text, "validation"), strict=True)):
        passage = Passage((*prompt.tolist(), *answer.tolist()), len(prompt))
        own = {site: torch.from_numpy(v[min(row, len(v) - 1)] * factor).float() for site, v in vectors.items()}
        with torch.no_grad():
            scores = log_probs(model, passage, {site: added(passage, vector) for site, vector in own.items()})
        found.append(float(of_answer(scores, passage).double().mean()))
    return np.array(found)


def margins(vectors: Mapping[Site, np.ndarray], factor: float) -> np.ndarray:
    return rates("chosen", vectors, factor) - rates("rejected", vectors, factor)


def drawn(seed: int, sites: tuple[Site, ...], rows: int = 1) -> dict[Site, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {site: rng.standard_normal((rows, 32)) * 10.0 ** rng.integers(-2, 3) for site in sites}


@pytest.mark.parametrize("sites", [SITES[:1], SITES[1:2], SITES], ids=["first block", "second", "several"])
@pytest.mark.parametrize("each_row", [False, True], ids=["one vector", "one a row"])
def test_gains_are_what_a_small_dose_begins_with(sites: tuple[Site, ...], each_row: bool) -> None:
    data = kept_data(*NAMES)
    rows = len(data.prompts("validation"))
    gradients, norms = preference_gradients(data, sites, ("validation",)), state_norms(data, sites)
    vectors = drawn(0, sites, rows if each_row else 1)
    gains = first_order_gain(gradients, vectors, norms)
    assert gains.shape == (rows,) and gains.dtype == np.float64 and rows > 5
    dose, step = SCREEN_DOSE / relative_norm(vectors, norms), 0.05
    measured = (margins(vectors, step * dose) - margins(vectors, -step * dose)) / (2 * step)
    np.testing.assert_allclose(gains, measured, rtol=0.03, atol=0.01 * np.abs(measured).max())


def test_gains_depend_on_directions_and_not_on_lengths() -> None:
    data = kept_data(*NAMES)
    gradients, norms = preference_gradients(data, SITES, ("validation",)), state_norms(data, SITES)
    learned = {site: rows.mean(axis=0)[None] for site, rows in preference_gradients(data, SITES, ("fit",)).items()}
    gains = first_order_gain(gradients, learned, norms)
    assert gains.mean() > 0
    for factor in (-3.0, 1e-4, 70.0):
        scaled = {site: factor * vector for site, vector in learned.items()}
        np.testing.assert_allclose(first_order_gain(gradients, scaled, norms), np.sign(factor) * gains, rtol=1e-9)
    nothing = {site: 0 * vector for site, vector in learned.items()}
    assert not first_order_gain(gradients, nothing, norms).any()
    # What is there already: the same vector at a site of its own is worth that site's part alone.
    alone = first_order_gain(gradients, {SITES[0]: learned[SITES[0]]}, norms)
    by_hand = gradients[SITES[0]] @ learned[SITES[0]][0]
    by_hand *= SCREEN_DOSE * norms[SITES[0]] / np.linalg.norm(learned[SITES[0]])
    np.testing.assert_allclose(alone, by_hand, rtol=1e-9)


def test_norms_of_several_sites_add_up_in_units_of_their_states() -> None:
    norms = {SITES[0]: 2.0, SITES[1]: 10.0}
    vectors = {
        SITES[0]: np.array([[6.0, 0.0], [0.0, 0.0], [2.0, 0.0]]),
        SITES[1]: np.array([[0.0, 40.0], [0.0, 10.0], [0.0, 0.0]]),
    }
    # 3 and 4, 0 and 1, 1 and 0.
    assert relative_norm(vectors, norms) == pytest.approx(np.median([5.0, 1.0, 1.0]))
    assert relative_norm({SITES[1]: vectors[SITES[1]][:1]}, norms) == pytest.approx(4.0)


def test_gradients_are_those_of_the_rows_and_norms_those_of_the_queries() -> None:
    data, site = PlantedData(), Site("resid_post", 2)
    shifts = data.shifts(site, "fit", "calibration").astype(np.float64)
    expected = 2 * shifts / np.square(shifts).sum(1, keepdims=True)
    found = preference_gradients(data, [site], ("fit", "calibration"))[site]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    lengths = np.linalg.norm(data.query(site, "fit").astype(np.float64), axis=1)
    assert state_norms(data, [site]) == {site: pytest.approx(np.median(lengths))}


def test_ranks_of_gains_are_those_of_small_doses_measured() -> None:
    data = kept_data(*NAMES)
    gains, reached = [], []
    for seed in range(8):
        sites = SITES if seed % 4 == 3 else (SITES[seed % 4],)
        gradients, norms = preference_gradients(data, sites, ("validation",)), state_norms(data, sites)
        vectors = drawn(seed, sites)
        gains.append(first_order_gain(gradients, vectors, norms).mean())
        dose = 0.2 * SCREEN_DOSE / relative_norm(vectors, norms)
        reached.append((margins(vectors, dose) - margins(vectors, 0.0)).mean())
    agreement = rank_agreement(gains, reached)
    assert agreement is not None and agreement > 0.9


def test_agreement_is_of_ranks_and_needs_three() -> None:
    assert rank_agreement([1.0, 2.0, 30.0], [0.1, 0.2, 0.21]) == pytest.approx(1.0)
    assert rank_agreement([1.0, 2.0, 30.0, 31.0], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_agreement([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)
    for gains, values in (([1.0, 2.0], [1.0, 2.0]), ([1.0] * 4, [1.0, 2.0, 3.0, 4.0]), ([1.0, 2.0, 3.0], [0.5] * 3)):
        assert rank_agreement(gains, values) is None
