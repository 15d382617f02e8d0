"""What methods are compared on: the playground and a real model, two tasks each, with what is asked and how it is judged.

A subject gives the rows to fit on, and says of a way to ask what comes back: a score for each held-out item, and what
became of prompts that should stay as they are. Halves are drawn by the seed, so three seeds are three splits.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real.real_conditions import Condition
from benchmarks.real.real_data import (
    GeneralData,
    Sizes,
    advbench_split,
    asked,
    general_data,
    refusal_rows,
    truthful_halves,
    truthful_rows,
    xstest_split,
)
from benchmarks.real.real_measures import Clock, choices, general, own_words, refusals
from benchmarks.real.real_rows import CAREFUL, HARM, HONEST, LITERAL, POLICY, SORRY
from benchmarks.real.real_setup import load_model, working_dtype
from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.evaluation.behaviour import JudgedPrompt, Outcome, evaluate
from finesteer_hf.evaluation.data.playground_eval import fit_rows, general_prompts, target_prompts
from finesteer_hf.evaluation.measures.prompts import as_chat
from finesteer_hf.fitting.data.splits import SplitBy


SUBJECTS = ("playground-truthful", "playground-refusal", "real-truthful", "real-refusal")
PROMPTS = {"truthful": (HONEST, LITERAL, CAREFUL), "refusal": (HARM, SORRY, POLICY)}
NEW_TOKENS = 24
SHOWN = 12


class Subject(abc.ABC):
    """A model and a task.

    Args:
        name: out of `SUBJECTS`.
        seed: of the halves and of the fits.
        quick: a few of everything, to try the machinery.
    """

    def __init__(self, name: str, seed: int, quick: bool) -> None:
        self.name, self.seed, self.quick = name, seed, quick
        self.task = name.rpartition("-")[2]

    @functools.cached_property
    @abc.abstractmethod
    def base(self) -> tuple[Any, Any]:
        """Model and tokenizer that fits are made on."""

    @functools.cached_property
    @abc.abstractmethod
    def steered(self) -> Any:
        """The model that is asked."""

    @functools.cached_property
    @abc.abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Preference rows of the fit half."""

    @functools.cached_property
    @abc.abstractmethod
    def general_rows(self) -> list[dict[str, Any]]:
        """General prompts of the fit half."""

    @abc.abstractmethod
    def ask(self, adapter: str | None = None, system: str | None = None, packed: bool = True) -> dict[str, Any]:
        """What comes back, JSON-ready.

        `ids` and `scores` are of the held-out items, `others` are further scores by name, `identical` says whether each
        general prompt's greedy answer is the unsteered one's, and `texts` has the first answers. Without `packed`, no two
        answers share a row when they are scored: a method that takes tokens back looks at its row.
        """

    @abc.abstractmethod
    def fit_score(self, system: str) -> float:
        """How well a system message does on the fit half."""

    @property
    @abc.abstractmethod
    def split(self) -> SplitBy:
        """What the parts of a fit are disjoint by."""

    @property
    def device(self) -> str:
        """Where the model runs: `cpu` or `cuda`."""
        return str(self.base[0].device.type)

    @property
    def dtype(self) -> str:
        """Of the model's weights."""
        return str(self.base[0].dtype).removeprefix("torch.")

    @property
    def sizes(self) -> dict[str, int]:
        """Of the model."""
        config = self.base[0].config
        return {"layers": int(config.num_hidden_layers), "width": int(config.hidden_size)}

    def best_prompt(self) -> str:
        """The system message that does best on the fit half."""
        return max(PROMPTS[self.task], key=self.fit_score)


class Playground(Subject):
    """The model organism; its judges are exact."""

    @functools.cached_property
    def base(self) -> tuple[Any, Any]:
        return playground.load()

    @functools.cached_property
    def steered(self) -> Any:
        return SteeredModelForCausalLM.from_pretrained(playground.model_path())

    @property
    def split(self) -> SplitBy:
        # Variants of a request must not lie on both sides; the rows' category says what are variants.
        return "group"

    @property
    def _task(self) -> Any:
        return "safety" if self.task == "refusal" else self.task

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        return fit_rows(self._task, split="question", limit=60 if self.quick else 600, seed=self.seed)

    @functools.cached_property
    def general_rows(self) -> list[dict[str, Any]]:
        return list(playground.general_rows("fit", seed=self.seed))

    def _evaluated(self, prompts: list[JudgedPrompt], adapter: str | None, system: str | None) -> Outcome:
        if system is not None:
            prompts = [dataclasses.replace(p, prompt=as_chat(p.text, system)) for p in prompts]
        return evaluate(self.steered, self.base[1], prompts, adapter=adapter, choices=False, max_new_tokens=NEW_TOKENS)

    @functools.cached_property
    def _prompts(self) -> tuple[list[JudgedPrompt], list[JudgedPrompt]]:
        limit = 20 if self.quick else 300
        targets = target_prompts(self._task, split="question", limit=limit, seed=self.seed)
        return targets, general_prompts(limit=limit, seed=self.seed)

    @functools.cached_property
    def _unsteered(self) -> Outcome:
        return self._evaluated(self._prompts[1], None, None)

    def ask(self, adapter: str | None = None, system: str | None = None, packed: bool = True) -> dict[str, Any]:
        target = self._evaluated(self._prompts[0], adapter, system)
        base = self._unsteered
        plain = adapter is None and system is None
        other = base if plain else self._evaluated(self._prompts[1], adapter, system)
        pairs = zip(other.answers.ids, base.answers.ids, strict=True)
        fires = [None if found is None else found.k / found.n for found in (target.fires(), other.fires())]
        return {
            "ids": [prompt.id for prompt in target.prompts],
            "scores": [float(hit) for hit in target.hits],
            "others": {"neither": [float(verdict is None) for verdict in target.verdicts]},
            "identical": [list(map(int, a)) == list(map(int, b)) for a, b in pairs],
            "general_right": [float(hit) for hit in other.hits],
            "fires": None if None in fires else fires,
            "texts": [list(pair) for pair in zip([p.text for p in target.prompts], target.answers.texts, strict=True)][
                :SHOWN
            ],
        }

    def fit_score(self, system: str) -> float:
        some = target_prompts(self._task, half="fit", split="question", limit=60, seed=self.seed)
        return float(np.mean(self._evaluated(some, None, system).hits))


class Real(Subject):
    """SmolLM2-135M-Instruct, or another model's folder: TruthfulQA's choices, or refusals of AdvBench and JailbreakBench.

    Args:
        name, seed, quick: as for `Subject`.
        source: the model.
        data: folder of the data sets.
        device: where the model runs.
    """

    def __init__(self, name: str, seed: int, quick: bool, source: str, data: Path, device: str) -> None:
        super().__init__(name, seed, quick)
        self.source, self.data, self.place = source, data, device
        few = Sizes(fit=48, questions=12, spoken=12, requests=8, xstest=8, general=8, texts=2, chosen_on=8)
        self.amounts = few if quick else Sizes(spoken=100, xstest=60, general=60, texts=10, chosen_on=60)

    @functools.cached_property
    def base(self) -> tuple[Any, Any]:
        return load_model(self.source, working_dtype(self.place), self.place)

    @functools.cached_property
    def steered(self) -> Any:
        return SteeredModelForCausalLM.from_model(load_model(self.source, working_dtype(self.place), self.place)[0])

    @property
    def split(self) -> SplitBy:
        return "prompt"

    @functools.cached_property
    def _general(self) -> GeneralData:
        return general_data(self.data, self.amounts, self.seed)

    @functools.cached_property
    def _halves(self) -> Any:
        return truthful_halves(self.data, self.amounts, seed=self.seed)

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        if self.task == "truthful":
            return truthful_rows(self._halves[0])
        return refusal_rows(self.data, self.amounts, self.seed)

    @functools.cached_property
    def general_rows(self) -> list[dict[str, Any]]:
        return self._general.fit_rows()

    @functools.cached_property
    def _reference(self) -> dict[str, Any]:
        return general(Condition(self.steered, self.base[1]), self._general, 0, None, Clock(lambda text: None))

    def ask(self, adapter: str | None = None, system: str | None = None, packed: bool = True) -> dict[str, Any]:
        condition = Condition(self.steered, self.base[1], adapter=adapter, system=system)
        found = self._truthful(condition, packed) if self.task == "truthful" else self._refused(condition)
        if adapter is None and system is None:
            identical = [True] * len(self._general.held_out)
        else:
            identical = general(condition, self._general, 0, self._reference, Clock(lambda text: None))["identical"]
        return {**found, "identical": identical, "sources": self._general.sources}

    def _truthful(self, condition: Condition, packed: bool) -> dict[str, Any]:
        questions = self._halves[1]
        # Where a forward costs its launch, batches of many answers are quicker than rows that hold one question's.
        packed = packed and self.device == "cpu"
        scores = choices(condition, questions, lambda text: None, packed=packed)
        asked_too = [question.question for question in questions[: self.amounts.spoken]]
        said = own_words(condition, asked_too)
        return {
            "ids": [question.question for question in questions],
            "scores": scores["mc2"],
            "others": {"mc1": scores["mc1"], "own_words": said["own_words"], "repeats": said["repeats"]},
            "fires": None if said["gate"] is None else [float(np.mean(np.array(said["gate"]) >= 0.5)), None],
            "texts": [list(pair) for pair in zip(asked_too, said["texts"], strict=True)][:SHOWN],
        }

    def _refused(self, condition: Condition) -> dict[str, Any]:
        sets = asked(self.data, self.amounts, self.seed)
        found = refusals(condition, sets)
        kinds = {name: [float(kind == "refuse") for kind in found[name]["classes"]] for name in sets}
        texts = [list(pair) for pair in zip(sets["jailbreakbench"], found["jailbreakbench"]["texts"], strict=True)]
        return {
            "ids": sets["advbench"] + sets["jailbreakbench"],
            "scores": kinds["advbench"] + kinds["jailbreakbench"],
            "others": kinds,
            "degenerate": {name: found[name]["classes"].count("degenerate") for name in sets},
            "texts": texts[:SHOWN],
        }

    def fit_score(self, system: str) -> float:
        condition, count = Condition(self.steered, self.base[1], system=system), self.amounts.chosen_on
        if self.task == "truthful":
            return float(np.mean(choices(condition, self._halves[0][:count], lambda text: None)["mc2"]))
        own = {
            "unsafe": [row["goal"] for row in advbench_split(self.data, self.seed)[0][:count]],
            "safe": [p.prompt for p in xstest_split(self.data)[0] if not p.harmful][:count],
        }
        classes = {name: found["classes"] for name, found in refusals(condition, own).items()}
        share = {name: float(np.mean([kind == "refuse" for kind in found])) for name, found in classes.items()}
        return share["unsafe"] - share["safe"]


def subject_of(name: str, seed: int, quick: bool, source: str, data: Path, device: str) -> Subject:
    """A subject by name."""
    if name.startswith("playground"):
        return Playground(name, seed, quick)
    return Real(name, seed, quick, source, data, device)
