"""Gate figures against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from finesteer_hf.evaluation.gates import auroc, gate_figures, tpr_at_fpr


def test_figures_are_counts() -> None:
    gate_ir, gate_general = [1.0, 1.0, 0.4, 0.9], [0.0, 0.0, 0.5, 0.1, 0.0]
    figures = gate_figures(gate_ir, gate_general)
    assert (figures.miss.k, figures.miss.n) == (1, 4)
    assert (figures.false_alarm.k, figures.false_alarm.n) == (1, 5)
    assert figures.fires_ir.k == 3 and figures.zero_general.k == 3
    assert figures.dose_ir.value == pytest.approx(0.825) and figures.dose_general.value == pytest.approx(0.12)


def test_auroc_and_tpr_are_those_of_pairs_and_of_thresholds() -> None:
    generator = np.random.default_rng(0)
    ir, general = generator.normal(1, 1, 60), generator.normal(0, 1, 200)
    wins = (ir[:, None] > general).mean() + 0.5 * (ir[:, None] == general).mean()
    assert auroc(ir, general) == pytest.approx(wins)
    best = max((ir >= threshold).mean() for threshold in np.r_[ir, general] if (general >= threshold).mean() <= 0.01)
    assert tpr_at_fpr(ir, general, 0.01) == pytest.approx(best)
    assert np.isnan(auroc(ir, [])) and np.isnan(tpr_at_fpr([], general, 0.01))


def test_impossible_gates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        gate_figures([1.2], [0.0])
    with pytest.raises(ValueError, match="2 entries for 1"):
        gate_figures([1.0], [0.0], score_ir=[1.0, 2.0])
