"""Whether a gate reads more than the form of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from finesteer_hf.estimators import FormProbe
from finesteer_hf.method_api import FitData, Part
from finesteer_hf.methods._shared.rows import general_texts, query_kinds, query_texts
from finesteer_hf.sites import Site


# Fewest prompts of each class for a probe of their form.
MIN_PROBED = 20
# Fewest general prompts in the IR prompts' form to make choices on; with fewer, all count.
MIN_SAME_FORM = 20


@dataclass(frozen=True)
class PromptForm:
    """A probe of the prompts' form, and the general prompts that it cannot separate from IR prompts.

    Attributes:
        probe: fitted on the texts only; None if there are too few.
        epsilon: share of the IR prompts that the gate may miss.
    """

    probe: FormProbe | None
    epsilon: float

    @classmethod
    def of(cls, data: FitData, read: Site, parts: tuple[Part, ...], epsilon: float) -> PromptForm:
        """Probe the prompts of some parts."""
        own, general = query_texts(data, read, parts), general_texts(data, read, parts)
        if min(len(own), len(general)) < MIN_PROBED:
            return cls(None, epsilon)
        return cls(FormProbe(seed=data.seed).fit(own, general, query_kinds(data, read, parts)), epsilon)

    def same(self, texts: list[str]) -> NDArray[np.bool_]:
        """Which general prompts have the form of IR prompts; all without a probe."""
        return np.ones(len(texts), dtype=bool) if self.probe is None else self.probe.same_form(texts, self.epsilon)

    def judged(self, texts: list[str]) -> NDArray[np.bool_]:
        """The general prompts for making choices: those of the same form, if there are enough."""
        same = self.same(texts)
        return same if same.sum() >= MIN_SAME_FORM else np.ones(len(texts), dtype=bool)

    def weights(self, own: list[str], general: list[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Weights of IR and general prompts in a classifier of states that make it learn less of their form."""
        return None if self.probe is None else self.probe.overlap_weights(own, general)

    def report(self, own: list[str], general: list[str], fires: NDArray[np.bool_]) -> dict[str, Any] | None:
        """Compare the gate's decisions on held-out prompts with their form.

        Args:
            own: held-out IR prompts.
            general: held-out general prompts.
            fires: whether the gate steers them, in that order.

        Returns:
            `auroc` of the form alone, `decisions_auroc` of the form as a predictor of the gate's decisions (None if
            they are all equal), and `tells`, the strongest differences in words; None without a probe.
        """
        if self.probe is None:
            return None
        odds = self.probe.score_samples([*own, *general])
        alike = fires.all() or not fires.any()
        return {
            "auroc": self.probe.auroc_,
            "decisions_auroc": None if alike else float(roc_auc_score(fires, odds)),
            "tells": self.probe.describe(1),
        }
