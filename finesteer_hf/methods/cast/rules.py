"""Rules between conditions and behaviours: `if C1 and not C2 then B1`.

The published code knows `or` and `and`, one of the two in a rule; `not`, and both in one rule, are this library's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


_RULE = re.compile(r"if\s+(.+?)\s+then\s+b([1-9]\d{0,5})", re.IGNORECASE)
# Longer ones are no rules; reading takes time that grows with the square of the length.
LONGEST = 2000
_TERM = re.compile(r"(not\s+)?c([1-9]\d{0,5})", re.IGNORECASE)


@dataclass(frozen=True)
class Term:
    """A condition, counted from 0, and whether it has to be met or not."""

    condition: int
    wanted: bool


@dataclass(frozen=True)
class Rule:
    """When a behaviour is added.

    Attributes:
        behavior: counted from 0.
        cases: the rule holds in any of them; a case is given where all of its terms hold.
    """

    behavior: int
    cases: tuple[tuple[Term, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read a rule; conditions and behaviours are counted from 1, `and` binds closer than `or`.

        Raises:
            ValueError: if it is none.
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
        """The conditions that it asks for."""
        return {term.condition for case in self.cases for term in case}

    def holds(self, met: torch.Tensor) -> torch.Tensor:
        """Whether it holds, bool `[rows]`, where conditions are met, bool `[rows, conditions]`."""
        return self._joined(lambda term: met[:, term.condition] == term.wanted)

    def margin(self, margins: torch.Tensor) -> torch.Tensor:
        """How far it is from changing its answer, `[rows]`: at least 0 where it holds.

        Args:
            margins: `[rows, conditions]`: how far each condition is from its threshold, at least 0 where it is met.
        """
        return self._joined(lambda term: margins[:, term.condition] * (1.0 if term.wanted else -1.0))

    def _joined(self, value: Callable[[Term], torch.Tensor]) -> torch.Tensor:
        cases = [torch.stack([value(term) for term in case]).amin(dim=0) for case in self.cases]
        return torch.stack(cases).amax(dim=0)
