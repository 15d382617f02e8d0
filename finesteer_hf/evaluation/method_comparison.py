"""Methods fitted on one part of a user's rows and tested on the other: what each gains and costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.errors import DatasetError
from finesteer_hf.evaluation.behaviour import JudgedPrompt, Outcome, evaluate
from finesteer_hf.evaluation.comparison import ComparisonRow, compare
from finesteer_hf.evaluation.data.truthfulqa import unigram_f1
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem
from finesteer_hf.evaluation.measures.statistics import Mean, PairedTest, mcnemar, paired_difference, paired_p_value
from finesteer_hf.fitting import default_general_prompts, fit_steering
from finesteer_hf.fitting.data.inputs import PACKAGED, in_form_of
from finesteer_hf.fitting.data.records import DatasetLike
from finesteer_hf.fitting.data.rows import (
    PreferenceRow,
    PromptRow,
    plain_text,
    prompt_key,
    read_preferences,
    read_prompts,
)
from finesteer_hf.fitting.data.splits import MIN_UNITS, SplitBy, split_rows, split_units


HIT = "nearer to chosen (ROUGE-1)"
OWN, GENERAL = "held-out rows", "general prompts, held out"


@dataclass(frozen=True)
class MethodTrial:
    """A method on the held-out prompts.

    Attributes:
        name: name of the method.
        adapter: the fitted adapter.
        own: answers and choices on prompts of the user's rows.
        general: answers to general prompts.
        seconds: time of its fit, without states that an earlier fit captured.
    """

    name: str
    adapter: SteeringAdapter
    own: Outcome
    general: Outcome
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of the adapter's parameters."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.adapter.tensors.values())

    def against_base(self, comparison: MethodComparison) -> list[ComparisonRow]:
        """All figures, paired with the base model's."""
        own = compare(OWN, HIT, comparison.own, self.own)
        # General prompts have no right answer here; the answer should stay the same.
        general = compare(GENERAL, HIT, comparison.general, self.general)[1:]
        return [*own, *general]


@dataclass(frozen=True)
class Duel:
    """Two methods on the same held-out prompts.

    Attributes:
        first: name of the first.
        second: name of the second.
        mc1: McNemar's test of MC1.
        mc2: paired change of MC2 from the first to the second.
        mc2_p: its p-value, by sign flips.
    """

    first: str
    second: str
    mc1: PairedTest
    mc2: Mean
    mc2_p: float


@dataclass(frozen=True)
class MethodComparison:
    """Methods side by side.

    Attributes:
        own: the base model on the held-out prompts of the user's rows.
        general: the base model on general prompts.
        trials: the methods that were fitted, in the given order.
        failed: why the others failed.
        fitted: number of rows in the fits.
    """

    own: Outcome
    general: Outcome
    trials: list[MethodTrial]
    failed: dict[str, str]
    fitted: int

    def duels(self) -> list[Duel]:
        """Every pair of methods, the earlier one first."""
        pairs = [(a, b) for i, a in enumerate(self.trials) for b in self.trials[i + 1 :]]
        return [
            Duel(
                a.name,
                b.name,
                mcnemar(_choices(a.own).mc1, _choices(b.own).mc1),
                b.own.mc2_change(a.own),
                paired_p_value(_choices(a.own).mc2, _choices(b.own).mc2),
            )
            for a, b in pairs
        ]

    def mc2_change(self, trial: MethodTrial) -> Mean:
        """Change of MC2 from the base model to a method, paired."""
        return paired_difference(_choices(self.own).mc2, _choices(trial.own).mc2)


def _choices(outcome: Outcome) -> Any:
    assert outcome.choices is not None
    return outcome.choices


@dataclass(frozen=True)
class Parts:
    """A user's data in two parts that share no prompt.

    Attributes:
        fit: rows to fit on, in TRL's preference format.
        general_fit: general prompts for the fit; None for a fit without any.
        own: held-out prompts with their chosen and rejected answers.
        general: held-out general prompts.
    """

    fit: list[dict[str, Any]]
    general_fit: list[dict[str, Any]] | None
    own: list[JudgedPrompt]
    general: list[JudgedPrompt]


def part(
    dataset: DatasetLike,
    general_dataset: DatasetLike | None,
    *,
    split: SplitBy = "prompt",
    seed: int = 0,
    max_rows: int | None = None,
) -> Parts:
    """Hold out a fifth of the prompts or categories, and a fifth of the general prompts.

    Args:
        dataset: rows as for `fit_steering`.
        general_dataset: prompts that must not be steered; `default` takes the packaged ones, None fits without any and
            still tests on the packaged ones.
        split: `prompt`, or `group` for whole categories.
        seed: seed of the draws.
        max_rows: most rows used of each data set.

    Raises:
        DatasetError: if there are too few prompts, categories or general prompts to hold any out.
    """
    rows = read_preferences(dataset, "data", max_rows=max_rows, seed=seed).rows
    keys = [prompt_key(row.prompt) for row in rows]
    groups = None if rows[0].group is None else [str(row.group) for row in rows]
    own = split_rows(keys, groups, seed, by=split)
    if not own.held_out:
        raise DatasetError(f"A comparison needs at least {MIN_UNITS} different prompts, got {len(set(keys))}.")
    held_out = {int(row) for row in own.rows["validation"]}
    packaged = general_dataset is None or (isinstance(general_dataset, str) and general_dataset == PACKAGED)
    asked = [{"prompt": text} for text in default_general_prompts()] if packaged else general_dataset
    known = set(keys)
    prompts = in_form_of(rows, read_prompts(asked, max_rows=max_rows, seed=seed).rows)
    prompts = [row for row in prompts if prompt_key(row.prompt) not in known]
    general = split_units([prompt_key(row.prompt) for row in prompts], seed)
    if not general.held_out:
        raise DatasetError(
            f"A comparison needs at least {MIN_UNITS} general prompts that are not in the rows, got {len(prompts)}."
        )
    rest = set(general.rows["validation"].tolist())
    return Parts(
        fit=[_record(row) for number, row in enumerate(rows) if number not in held_out],
        general_fit=None
        if general_dataset is None
        else [{"prompt": row.prompt} for number, row in enumerate(prompts) if number not in rest],
        own=_judged([rows[number] for number in sorted(held_out)]),
        general=[_general(row) for number, row in enumerate(prompts) if number in rest],
    )


def _record(row: PreferenceRow) -> dict[str, Any]:
    record = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    return record if row.group is None else {**record, "category": row.group}


def _judged(rows: Sequence[PreferenceRow]) -> list[JudgedPrompt]:
    """Each prompt once, with the answers of all its rows."""
    of_prompt: dict[str, list[PreferenceRow]] = {}
    for row in rows:
        of_prompt.setdefault(prompt_key(row.prompt), []).append(row)
    made = []
    for group in of_prompt.values():
        chosen = tuple(dict.fromkeys(plain_text(row.chosen) for row in group))
        rejected = tuple(dict.fromkeys(plain_text(row.rejected) for row in group))
        item = ChoiceItem(group[0].prompt, chosen, rejected)
        judge = partial(nearer_to_chosen, chosen, rejected)
        made.append(JudgedPrompt(f"row-{group[0].number}", group[0].prompt, judge, group[0].group or "", item))
    return made


def _general(row: PromptRow) -> JudgedPrompt:
    return JudgedPrompt(f"general-{row.number}", row.prompt, _no_verdict, "general")


def _no_verdict(text: str) -> None:
    return None


def nearer_to_chosen(chosen: Sequence[str], rejected: Sequence[str], text: str) -> bool:
    """Whether an answer shares more words with a chosen answer than with any rejected one (ROUGE-1)."""
    return max(unigram_f1(text, answer) for answer in chosen) > max(unigram_f1(text, answer) for answer in rejected)


def compare_methods(
    model: Any,
    tokenizer: Any,
    parts: Parts,
    configs: Mapping[str, SteeringConfig],
    *,
    max_new_tokens: int = 48,
    store_dir: str | Path | None = None,
    note: Callable[[str], None] = lambda message: None,
    **fitting: Any,
) -> MethodComparison:
    """Fit methods on the same rows and test them on the same held-out prompts.

    Each method chooses its layer and strength in its fit, on rows of the fit part; nothing is chosen on the held-out
    part.

    Args:
        model: a steered model without an active adapter.
        tokenizer: its tokenizer.
        parts: the user's data, split.
        configs: the methods' configs by name.
        max_new_tokens: most tokens of an answer.
        store_dir: folder of the captured states; by default a temporary one, which the methods share.
        note: prints a line of progress.
        **fitting: more arguments of `fit_steering`.

    Returns:
        The comparison; a method that cannot be fitted on the data is in `failed` with the reason.
    """
    ask = partial(evaluate, model, tokenizer, max_new_tokens=max_new_tokens)
    note(f"{len(parts.fit)} rows to fit on; {len(parts.own)} prompts and {len(parts.general)} general ones held out")
    own, general = ask(parts.own), ask(parts.general)
    trials, failed = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in configs.items():
            start = time.perf_counter()
            try:
                adapter = fit_steering(
                    model,
                    tokenizer,
                    parts.fit,
                    config,
                    general_dataset=parts.general_fit,
                    store_dir=store_dir or temporary,
                    **fitting,
                )
            except ValueError as error:
                # Too few rows for this method, or a model that it cannot steer: the others are still compared.
                failed[name] = str(error)
                note(f"{name} cannot be fitted on these rows: {error}")
                continue
            seconds = time.perf_counter() - start
            model.load_steering(adapter, name)
            trials.append(
                MethodTrial(name, adapter, ask(parts.own, adapter=name), ask(parts.general, adapter=name), seconds)
            )
            model.delete_steering(name)
            note(f"{name}: fitted in {seconds:.0f} s, strength {adapter.config.strength:g}")
    return MethodComparison(own, general, trials, failed, len(parts.fit))
