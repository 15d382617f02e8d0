"""The data that a method is fitted on: captured states by split, and steered runs on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import numpy as np

from finesteer_hf.fitting.answers import run_answers
from finesteer_hf.fitting.capture.store import ActivationStore
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.data.splits import Split
from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.fitting.progress import FitProgress
from finesteer_hf.method_api import AnswerRun, DosePoint, ModelInfo, Part, Pool, Side, Text
from finesteer_hf.methods._shared.objective import Limits
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.sites import Site, TextTower


# Rows of a chunk: 64 MB at width 4096.
CHUNK_ROWS = 4096


@dataclass
class CapturedData:
    """`FitData` on an activation store.

    Attributes:
        info: the base model's sizes.
        seed: seed of everything random in the fit.
        tower: the model's decoder stack.
        store: holds the states of all rows and general prompts.
        rows: the preference rows; those of the validation data set come last.
        general_prompts: prompts that must not be steered; may be empty.
        split: parts of the rows.
        general_split: parts of the general prompts.
        row_prompts: for each row, the label of its prompt.
        row_units: for each row, the label of its split unit.
        row_kinds: for each row, its category; None if the data set has none.
        row_texts: for each row, the text of its prompt.
        general_texts: for each general prompt, its text.
        dose: runs the model steered.
        bars: shows progress.
        limits: bounds on what steering may cost.
    """

    info: ModelInfo
    seed: int
    limits: Limits
    tower: TextTower
    store: ActivationStore
    rows: Sequence[EncodedRow]
    general_prompts: Sequence[Passage]
    split: Split
    general_split: Split
    row_prompts: np.ndarray
    row_units: np.ndarray
    row_kinds: np.ndarray | None
    row_texts: Sequence[str]
    general_texts: Sequence[str]
    dose: DoseRunner
    bars: FitProgress

    def query(self, site: Site, part: Part, pool: Pool = "query") -> np.ndarray:
        """States of the prompts' last tokens, or means over the prompts, `[rows, width]` float32."""
        return self._states(site, pool, self._passages("query", part))

    def chosen(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        """Pooled states of the chosen answers, `[rows, width]` float32."""
        return self._states(site, pool, self._passages("chosen", part))

    def rejected(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        """Pooled states of the rejected answers, `[rows, width]` float32."""
        return self._states(site, pool, self._passages("rejected", part))

    def prompts(self, part: Part) -> np.ndarray:
        """Label of each row's prompt; rows that share a prompt are one query."""
        return self.row_prompts[self.split.rows[part]]

    def groups(self, part: Part) -> np.ndarray:
        """Label of what is held out together: the row's prompt, or its category if categories are split."""
        return self.row_units[self.split.rows[part]]

    def kinds(self, part: Part) -> np.ndarray | None:
        """Category of each row, `[rows]` of str, whatever the split; None if the data set has none."""
        return None if self.row_kinds is None else self.row_kinds[self.split.rows[part]]

    def texts(self, text: Literal["prompt", "general"], part: Part) -> list[str]:
        """Texts of the rows' prompts, or of the general prompts, without the chat template."""
        texts, split = (self.row_texts, self.split) if text == "prompt" else (self.general_texts, self.general_split)
        return [texts[i] for i in split.rows[part]]

    def general(self, site: Site, part: Part, pool: Pool = "query") -> np.ndarray:
        """States of the general prompts, `[rows, width]` float32; zero rows if there are none."""
        return self._states(site, pool, self._passages("general", part))

    def chunks(
        self, side: Side, site: Site, parts: Sequence[Part], pool: Pool = "answer_mean"
    ) -> Iterator[np.ndarray]:
        """The same states in chunks `[rows, width]` float32 of at most `CHUNK_ROWS` rows, part by part."""
        passages = [passage for part in parts for passage in self._passages(side, part)]
        for start in range(0, len(passages), CHUNK_ROWS):
            yield self._states(
                site, pool if side in ("chosen", "rejected") else "query", passages[start : start + CHUNK_ROWS]
            )

    def tokens(self, text: Text, part: Part) -> list[np.ndarray]:
        """Token ids, int64, of the rows' prompts, of their answers alone, or of the general prompts."""
        passages = self._passages("query" if text == "prompt" else text, part)
        return [np.array(passage.ids[passage.answer_start or 0 :], dtype=np.int64) for passage in passages]

    def answers(
        self,
        text: Literal["chosen", "rejected"],
        part: Part,
        rows: Sequence[int],
        *,
        steering: SteeringProcessor | None = None,
        sites: Sequence[Site] = (),
    ) -> Iterator[AnswerRun]:
        """Run the model over the answers of some rows; see `run_answers`."""
        of_part = self.split.rows[part]
        passages = [getattr(self.rows[of_part[i]], text) for i in rows]
        return run_answers(self.dose.model, passages, steering, sites, self.dose.cache)

    def dose_response(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float], share: float = 1.0
    ) -> list[DosePoint]:
        """Run the model steered at each strength on the validation part, or on a share of its prompts."""
        with self.bars.task("running steered", self.dose.texts(build, strengths, share)) as advance:
            return self.dose.run(build, strengths, advance, share)

    def note(self, message: str) -> None:
        """Print a line of progress."""
        self.bars.say(message)

    def _passages(self, side: Side, part: Part) -> list[Passage]:
        if side == "general":
            return [self.general_prompts[i] for i in self.general_split.rows[part]]
        of_row = attrgetter("prompt" if side == "query" else side)
        return [of_row(self.rows[i]) for i in self.split.rows[part]]

    def _states(self, site: Site, pool: Pool, passages: Sequence[Passage]) -> np.ndarray:
        if not passages:
            return np.zeros((0, self.tower.width(site)), dtype=np.float32)
        return self.store.get((site, pool), passages)


def model_info(tower: TextTower) -> ModelInfo:
    """Sizes of a base model; no heads if it has no attention."""
    heads = int(getattr(tower.config, "num_attention_heads", 0) or 0)
    return ModelInfo(
        num_layers=tower.num_layers,
        hidden_size=tower.hidden_size,
        num_heads=heads,
        head_size=tower.head_size if heads else 0,
        vocab_size=int(tower.config.vocab_size),
        shows_attention=tower.shows_attention,
    )
