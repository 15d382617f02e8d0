"""The data that a method is fitted on: captured states, by split, and the model run steered on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.fitting.splits import Split
from finesteer_hf.fitting.store import ActivationStore
from finesteer_hf.methods.base import DosePoint, ModelInfo, Part, Pool
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.sites import Site


class CapturedData:
    """`FitData` on activation stores.

    Args:
        info: the base model's sizes.
        seed: of everything random in the fit.
        preferences: store of the preference rows.
        general: store of the general prompts; None if there are none.
        split: parts of the preference rows.
        general_split: parts of the general prompts.
        row_prompts: label of each row's prompt.
        row_units: label of what was split by.
        dose: runs the model steered.
        say: shows a line of progress.
    """

    def __init__(
        self,
        info: ModelInfo,
        seed: int,
        preferences: ActivationStore,
        general: ActivationStore | None,
        split: Split,
        general_split: Split | None,
        row_prompts: Sequence[str],
        row_units: Sequence[str],
        dose: DoseRunner,
        say: Callable[[str], None],
    ) -> None:
        self.info, self.seed = info, seed
        self._preferences, self._general = preferences, general
        self._split, self._general_split = split, general_split
        self._prompts = np.unique(row_prompts, return_inverse=True)[1]
        self._units = np.unique(row_units, return_inverse=True)[1]
        self._dose, self._say = dose, say

    def query(self, site: Site, part: Part) -> np.ndarray:
        """States of the prompts' last tokens."""
        return self._preferences.get(site, "query")[self._split.rows[part]]

    def chosen(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        """Pooled states of the chosen answers."""
        return self._preferences.get(site, f"chosen/{pool}")[self._split.rows[part]]

    def rejected(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        """Pooled states of the rejected answers."""
        return self._preferences.get(site, f"rejected/{pool}")[self._split.rows[part]]

    def prompts(self, part: Part) -> np.ndarray:
        """Label of each row's prompt."""
        return self._prompts[self._split.rows[part]]

    def groups(self, part: Part) -> np.ndarray:
        """Label of what is held out together."""
        return self._units[self._split.rows[part]]

    def general(self, site: Site, part: Part) -> np.ndarray:
        """States of the general prompts' last tokens; zero rows if there are none."""
        if self._general is None or self._general_split is None:
            width = self._preferences.get(site, "query").shape[1]
            return np.zeros((0, width), dtype=np.float32)
        return self._general.get(site, "query")[self._general_split.rows[part]]

    def dose_response(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float]
    ) -> list[DosePoint]:
        """Run the model steered at each strength on the validation part."""
        return self._dose.run(build, strengths)

    def note(self, message: str) -> None:
        """Show a line of progress."""
        self._say(message)


def model_info(model: Any, tower: Any) -> ModelInfo:
    """Sizes of a base model."""
    heads = int(getattr(tower.config, "num_attention_heads", 0) or 0)
    return ModelInfo(
        num_layers=tower.num_layers,
        hidden_size=tower.hidden_size,
        num_heads=heads,
        head_size=tower.head_size if heads else 0,
        vocab_size=int(tower.config.vocab_size),
    )
