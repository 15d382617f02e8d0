"""Trains vectors that are added to a frozen model's states, on preference rows.

`PreferenceRows` are the rows: they return the log-probabilities of their answers under a processor, with gradients to
the tensors that it uses. `TrainedShift` is such a processor, for one or more blocks. `train` is the loop. A loss is a
function of the answers' log-probabilities, and each method has its own.

    rows = PreferenceRows.draw(data, "fit", most=128)
    vector = torch.zeros(width, requires_grad=True)

    def losses(few, rng):
        steered = rows.steered(few, TrainedShift({site: vector}))
        return -torch.nn.functional.logsigmoid(steered.margins)

    history = train([vector], losses, len(rows), Training(epochs=4, learning_rate=0.01), seed=data.seed)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from transformers import get_scheduler

from finesteer_hf.errors import DatasetError
from finesteer_hf.method_api import AnswerRun, FitData, Part
from finesteer_hf.processors import Decision, Positions, QueryStates, SteeringProcessor, TokenView
from finesteer_hf.sites import Site


# Most rows with a graph in memory: each keeps the states of two answers at all blocks from the first steered one on.
ROWS_A_GRAPH = 8

Losses = Callable[[Sequence[int], np.random.Generator], torch.Tensor]
#: What is added at a site: a vector `[width]`, or a function from the queries' unsteered states to `[rows or 1,
#: width]`.
Shift = torch.Tensor | Callable[[Mapping[Site, torch.Tensor]], torch.Tensor]


# -- the rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of some rows' answers; each tensor `[rows]` float32, on the CPU.

    Attributes:
        chosen: log-probability of the whole chosen answer, in nats, summed over its tokens.
        rejected: that of the rejected answer.
        chosen_tokens: number of the chosen answer's tokens.
        rejected_tokens: number of the rejected answer's tokens.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        """Log-probability of the chosen minus the rejected answers, in nats, `[rows]`."""
        return self.chosen - self.rejected

    def __getitem__(self, rows: Sequence[int]) -> PairScores:
        """The scores of some rows."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return PairScores(
            self.chosen[index], self.rejected[index], self.chosen_tokens[index], self.rejected_tokens[index]
        )


@dataclass(frozen=True)
class PreferenceRows:
    """Preference rows of one part of the data.

    Attributes:
        data: runs the model.
        part: the split.
        rows: indices of the rows in their part.
        plain: scores of the unsteered model.
        prompt_tokens: numbers of the prompts' tokens, `[rows]` float32.
    """

    data: FitData
    part: Part
    rows: tuple[int, ...]
    plain: PairScores = field(repr=False)
    prompt_tokens: torch.Tensor = field(repr=False)

    @classmethod
    def draw(cls, data: FitData, part: Part, most: int | None = None) -> PreferenceRows:
        """Take the rows of a part, or at most `most` of them, drawn without replacement with the data's seed.

        The unsteered model runs over their answers once.
        """
        rows = np.arange(len(data.prompts(part)))
        if most is not None and len(rows) > most:
            rows = np.sort(np.random.default_rng(data.seed).choice(rows, most, replace=False))
        numbers = tuple(rows.tolist())
        prompts = data.tokens("prompt", part)
        lengths = torch.tensor([float(len(prompts[row])) for row in numbers])
        return cls(data, part, numbers, _scores(data, part, numbers, None), lengths)

    def __len__(self) -> int:
        return len(self.rows)

    def steered(self, which: Sequence[int], steering: SteeringProcessor) -> PairScores:
        """Scores under a processor; gradients reach the tensors that it uses in `transform`.

        Args:
            which: positions in `rows`, not row numbers of the part.
            steering: processor that steers.
        """
        return _scores(self.data, self.part, [self.rows[i] for i in which], steering)


def _scores(data: FitData, part: Part, rows: Sequence[int], steering: SteeringProcessor | None) -> PairScores:
    if not rows:
        return PairScores(*(torch.zeros(0) for _ in range(4)))
    found = []
    for text in ("chosen", "rejected"):
        runs = data.answers(text, part, rows, steering=steering)
        log_probs, tokens = zip(*((_log_prob(run), float(len(run.ids))) for run in runs), strict=True)
        found.append((torch.stack(log_probs), torch.tensor(tokens)))
    (chosen, chosen_tokens), (rejected, rejected_tokens) = found
    return PairScores(chosen, rejected, chosen_tokens, rejected_tokens)


def _log_prob(run: AnswerRun) -> torch.Tensor:
    return -(run.nll * len(run.ids)).cpu()


# -- what steers ------------------------------------------------------------------------------------------------------


class TrainedShift(SteeringProcessor):
    """Adds a vector with gradients at each of several sites.

    `decide` runs without gradients, so vectors are computed and added in `transform`. Scales of rows and `strength`
    are ignored: this is for training.

    Args:
        shifts: by site, a vector `[width]` float32, or a function from the queries' unsteered states at `reads` (by
            site `[rows, width]` float32, without gradients) to `[rows or 1, width]`.
        positions: tokens that are steered; `generated` begins at the query, the prompt's last token.
        factor: multiplies all vectors.
        reads: sites whose states are passed to the functions.
    """

    def __init__(
        self,
        shifts: Mapping[Site, Shift],
        *,
        positions: Positions = "generated",
        factor: float = 1.0,
        reads: Sequence[Site] = (),
    ) -> None:
        self.shifts = dict(shifts)
        self.maps = tuple(sorted(self.shifts))
        self.positions = positions
        self.factor = factor
        self.reads = tuple(reads)

    def decide(self, queries: QueryStates) -> Decision:
        """Keep the queries' states for `transform`."""
        return Decision(vectors={}, record={str(site): queries[site] for site in self.reads})

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Add the site's vector to the selected tokens of `[rows, tokens, width]`."""
        shift = self.shifts[site]
        if not isinstance(shift, torch.Tensor):
            noted = {} if view.decision is None else view.decision.record
            shift = shift({read: noted[str(read)] for read in self.reads})
        added = self.factor * shift.to(hidden.device, hidden.dtype).reshape(-1, 1, hidden.shape[-1])
        return hidden + (added if view.mask is None else view.mask[..., None] * added)


def first_order(
    losses: Callable[[Sequence[int], SteeringProcessor], torch.Tensor],
    rows: int,
    widths: Mapping[Site, int],
    positions: Positions,
) -> dict[Site, torch.Tensor]:
    """Gradients of the mean loss with respect to a vector at each of several sites, at zero.

    One pass gives all of them. The gradient's norm is the slope of the loss at a site, to first order.

    Args:
        losses: returns the losses of some rows, `[rows]`, under a processor.
        rows: number of rows.
        widths: widths of the sites' states.
        positions: tokens that the vectors are added to.

    Returns:
        By site `[width]` float32.

    Raises:
        DatasetError: if the loss does not depend on a vector at any of the sites.
    """
    leaves = {site: torch.zeros(width, requires_grad=True) for site, width in widths.items()}
    for few in _groups(np.arange(rows)):
        (losses(few, TrainedShift(leaves, positions=positions)).sum() / rows).backward()
    slopes = {site: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for site, leaf in leaves.items()}
    if not any(bool(slope.any()) for slope in slopes.values()):
        raise DatasetError(
            f"Answers do not depend on vectors at {[str(site) for site in slopes]} with positions={positions!r}: the rows' "
            "chosen and rejected answers are the same, or steered tokens cannot reach the answers from there. Give rows "
            "whose answers differ, an earlier layer, or positions='all'."
        )
    return slopes


# -- the loop ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Training:
    """How parameters are trained: with AdamW, which without decay is Adam.

    Attributes:
        epochs: passes over the rows.
        batch_size: rows per step.
        learning_rate: rate of the first step after the warm-up; groups of parameters may have their own.
        weight_decay: AdamW's, decoupled.
        schedule: how the rate falls over all steps: `constant`, `linear` to zero, or `cosine` to zero.
        warmup_steps: steps over which the rate rises linearly from zero; at most a tenth of all steps.
        clip: largest norm of a step's gradients, over all parameters; None does not clip.
    """

    epochs: int
    learning_rate: float
    batch_size: int = ROWS_A_GRAPH
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    clip: float | None = None

    def steps(self, rows: int) -> int:
        """Total number of steps over some rows."""
        return self.epochs * math.ceil(rows / self.batch_size)


@dataclass
class History:
    """The record of a training.

    Attributes:
        path: for each epoch, from 0 (before the first step) on: `epoch`, `fit` (mean loss of the epoch's steps, each
            before the step; none for epoch 0) and `held_out` (the result of `judge` after it; None without one).
        kept: the epoch whose parameters were kept.
    """

    path: list[dict[str, Any]] = field(default_factory=list)
    kept: int = 0

    def report(self) -> dict[str, Any]:
        """The same as JSON-ready values."""
        return {"path": self.path, "kept_epoch": self.kept}


def train(
    parameters: Sequence[torch.Tensor] | Sequence[dict[str, Any]],
    losses: Losses,
    rows: int,
    training: Training,
    *,
    seed: int,
    judge: Callable[[], float | None] | None = None,
    after_step: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda message: None,
) -> History:
    """Train tensors in place and keep the best epoch's by `judge`; without one, the last epoch's.

    Args:
        parameters: leaves that require gradients, or AdamW's groups of them.
        losses: returns the losses `[rows]` of some rows, given as positions from 0 to `rows`. It is called once per
            step (for each part of a batch of more than `ROWS_A_GRAPH` rows) and may draw from the generator.
        rows: number of rows.
        training: optimiser, rates, steps.
        seed: seed of the order of rows and of the draws of `losses`.
        judge: a loss on held-out rows, also called before the first step. It should steer with detached tensors, or
            the graphs of all its rows are kept. If it returns None, the last epoch is kept.
        after_step: called after each step, for example to cap a norm.
        note: prints a line per epoch.

    Raises:
        DatasetError: if there are no rows, or the loss is no longer finite.
    """
    if rows < 1:
        raise DatasetError("There are no rows to train on: the 'fit' part of the preference rows is empty.")
    steps = training.steps(rows)
    optimiser = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    warmup = min(training.warmup_steps, steps // 10)
    name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    schedule = get_scheduler(name, optimiser, num_warmup_steps=warmup, num_training_steps=steps)
    leaves = [leaf for group in optimiser.param_groups for leaf in group["params"]]
    rng = np.random.default_rng(seed)
    history, best, kept = History(), math.inf, None
    for epoch in range(training.epochs + 1):
        total = 0.0
        order = rng.permutation(rows) if epoch else np.zeros(0, dtype=np.int64)
        for start in range(0, len(order), training.batch_size):
            batch = order[start : start + training.batch_size]
            optimiser.zero_grad()
            for few in _groups(batch):
                part = losses(few, rng).sum() / len(batch)
                part.backward()
                total += float(part.detach()) * len(batch) / rows
            if training.clip is not None:
                torch.nn.utils.clip_grad_norm_(leaves, training.clip)
            optimiser.step()
            schedule.step()
            after_step()
        if not math.isfinite(total):
            raise DatasetError(f"The loss is {total} in epoch {epoch}. Give a smaller learning_rate.")
        held_out = judge() if judge is not None else None
        history.path.append({"epoch": epoch, "fit": total if epoch else None, "held_out": held_out})
        if held_out is None or held_out < best:
            best = math.inf if held_out is None else held_out
            history.kept, kept = epoch, [leaf.detach().clone() for leaf in leaves]
        if epoch:
            said = "" if held_out is None else f", held out {held_out:.4f}"
            note(f"epoch {epoch} of {training.epochs}: loss {total:.4f}{said}")
    with torch.no_grad():
        for leaf, value in zip(leaves, kept or leaves, strict=True):
            leaf.copy_(value)
    return history


def cap_norm(vector: torch.Tensor, most: float) -> None:
    """Shorten a parameter in place to a largest Euclidean norm; shorter ones stay as they are."""
    with torch.no_grad():
        norm = float(vector.norm())
        if norm > most:
            vector.mul_(most / norm)


def _groups(rows: np.ndarray) -> list[list[int]]:
    """Rows in groups whose graphs fit in memory."""
    return [rows[start : start + ROWS_A_GRAPH].tolist() for start in range(0, len(rows), ROWS_A_GRAPH)]
