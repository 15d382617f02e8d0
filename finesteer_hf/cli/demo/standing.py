"""Where FineSteer won, lost or made no significant difference: every comparison of the demo, losses included."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finesteer_hf.cli.demo.run import DemoResult, DemoTrial
from finesteer_hf.cli.demo.tables import hit_name
from finesteer_hf.evaluation.comparison import ALPHA
from finesteer_hf.evaluation.measures.statistics import PairedTest, Proportion, holm, mcnemar
from finesteer_hf.views.report import Mark


UNSEEN = {
    ("truthful", "question"): "questions unseen",
    ("truthful", "kind"): "whole kinds unseen",
    ("safety", "question"): "requests unseen",
    ("safety", "kind"): "whole categories unseen",
}
STANDING_COLUMNS = ("what", "n", "unsteered", "FineSteer", "CAA at its best", "FineSteer against CAA")
_WORDS: dict[Mark, str] = {"good": "ahead", "bad": "behind", "": "no difference"}


@dataclass(frozen=True)
class Standing:
    """One figure under three conditions.

    Attributes:
        what: what was counted, on what.
        unsteered: share under the base, or None.
        finesteer: share under the adapter.
        caa: share under the constant vector that was best on these prompts.
        test: CAA (first) against FineSteer (second), paired.
        holds: whether the difference is significant after Holm's correction over all comparisons of the demo.
    """

    what: str
    unsteered: Proportion | None
    finesteer: Proportion
    caa: Proportion
    test: PairedTest
    holds: bool = False

    @property
    def mark(self) -> Mark:
        """Whether FineSteer is ahead of CAA (`good`), behind it (`bad`), or neither, uncorrected."""
        if self.test.p_value >= ALPHA:
            return ""
        return "good" if self.test.only_second > self.test.only_first else "bad"

    @property
    def verdict(self) -> str:
        """The mark in words, with its counts and p."""
        gained, lost = self.test.only_second, self.test.only_first
        corrected = "" if self.holds or not self.mark else ", not after Holm"
        return f"{_WORDS[self.mark]}: {gained} gained, {lost} lost (p = {self.test.p_value:.1g}{corrected})"

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        unsteered = "-" if self.unsteered is None else self.unsteered.brief
        return self.what, str(self.finesteer.n), unsteered, self.finesteer.brief, self.caa.brief, self.verdict


def standings(result: DemoResult) -> list[Standing]:
    """All comparisons grouped by task, unseen kinds right after unseen questions."""
    trials = sorted(result.trials, key=lambda trial: (trial.task != "truthful", trial.split == "kind"))
    found = [standing for trial in trials for standing in _of(trial)]
    corrected = holm([standing.test.p_value for standing in found])
    return [replace(standing, holds=bool(p < ALPHA)) for standing, p in zip(found, corrected, strict=True)]


def _of(trial: DemoTrial) -> list[Standing]:
    unseen = UNSEEN[trial.task, trial.split]
    base, fine, caa = trial.base, trial.finesteer, trial.caa
    same = [
        [a == b for a, b in zip(arm.general.answers.ids, base.general.answers.ids, strict=True)] for arm in (caa, fine)
    ]
    return [
        Standing(
            f"{hit_name(trial)}, {unseen}",
            base.target.share,
            fine.target.share,
            caa.target.share,
            fine.target.against(caa.target),
        ),
        Standing(
            f"general output unchanged, {trial.task} adapter, {unseen}",
            None,
            fine.general.identical_to(base.general),
            caa.general.identical_to(base.general),
            mcnemar(*same),
        ),
    ]
