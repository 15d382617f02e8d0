"""One thing that the doctor looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


State = Literal["yes", "partly", "no"]


@dataclass(frozen=True)
class Check:
    """One thing that works, or does not.

    Attributes:
        name: what was looked at.
        state: whether it works.
        detail: what was found; where it does not work, why, and what to do.
        needed: whether nothing works without it.
    """

    name: str
    state: State
    detail: str
    needed: bool = False

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        return self.name, self.state, self.detail
