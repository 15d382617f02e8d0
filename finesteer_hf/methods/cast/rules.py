"""Rules between conditions and behaviours: `if C1 and not C2 then B1`.

The published code has `or` and `and`, one of them per rule; `not`, and both in one rule, are additions of this
library.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


_RULE = re.compile(r"if\s+(.+?)\s+then\s+b([1-9]\d{0,5})", re.IGNORECASE)
# Longer texts are not rules; parsing takes quadratic time.
LONGEST = 2000
_TERM = re.compile(r"(not\s+)?c([1-9]\d{0,5})", re.IGNORECASE)


@dataclass(frozen=True)
class Term:
    """A condition, counted from 0, and whether it must be met or not."""

    condition: int
    wanted: bool


@dataclass(frozen=True)
class Rule:
    """When a behaviour is added.

    Attributes:
        behavior: the behaviour, counted from 0.
        cases: the rule holds if any case does; a case holds if all of its terms do.
    """

    behavior: int
    cases: tuple[tuple[Term, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse a rule; conditions and behaviours are counted from 1, `and` binds tighter than `or`.

        Raises:
            ValueError: if the text is not a rule.
        """
        match = _RULE.fullmatch(text.strip()) if len(text) <= LONGEST else None
        cases: list[tuple[Term, ...]] = []
        for case in re.split(r"\s+or\s+", match.group(1), flags=re.IGNORECASE) if match else ():
            found = [_TERM.fullmatch(term) for term in re.split(r"\s+and\s+", case, flags=re.IGNORECASE)]
            cases.append(tuple(Term(int(term.group(2)) - 1, not term.group(1)) for term in found if term is not None))
            if None in found:
                match = None
        if match is None:
            raise ValueError(
                f"Cannot read the rule {text[:200]!r}. Write it as 'if C1 then B1', 'if C1 and not C2 then B1' or 'if C1 "
                "or C3 then B2'; C1 is the first of `conditions`, B1 the first of `behaviors`."
            )
        return cls(int(match.group(2)) - 1, tuple(cases))

    @property
    def conditions(self) -> set[int]:
        """The conditions that it uses."""
        return {term.condition for case in self.cases for term in case}

    def holds(self, met: torch.Tensor) -> torch.Tensor:
        """Whether it holds, bool `[rows]`, given which conditions are met, bool `[rows, conditions]`."""
        return self._joined(lambda term: met[:, term.condition] == term.wanted)

    def margin(self, margins: torch.Tensor) -> torch.Tensor:
        """Its distance from changing, `[rows]`: at least 0 if it holds.

        Args:
            margins: `[rows, conditions]`: distance of each condition from its threshold, at least 0 if it is met.
        """
        return self._joined(lambda term: margins[:, term.condition] * (1.0 if term.wanted else -1.0))

    def _joined(self, value: Callable[[Term], torch.Tensor]) -> torch.Tensor:
        cases = [torch.stack([value(term) for term in case]).amin(dim=0) for case in self.cases]
        return torch.stack(cases).amax(dim=0)
