"""The study on a real model: its settings and data, and how a row is fitted and put in place."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.real.real_conditions import Condition
from benchmarks.real.real_data import (
    GeneralData,
    Sizes,
    asked,
    general_data,
    refusal_row,
    refusal_rows,
    truthful_halves,
    truthful_rows,
    xstest_split,
)
from benchmarks.real.real_lora import Training, train
from benchmarks.real.real_measures import Clock
from benchmarks.real.real_rows import REFERENCE, Row, Task, slug_of
from benchmarks.real.real_setup import BASE, WEIGHTS, is_prepared, load_model
from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, fit_steering
from finesteer_hf.adapters.config import CONFIG_NAME, SteeringConfig
from finesteer_hf.evaluation.data.safety import is_refusal
from finesteer_hf.evaluation.data.truthfulqa import TruthfulQuestion


DATA = Path("../shared/data")
ADAPTER = "row"


@dataclasses.dataclass
class Study:
    """What all rows of a task share.

    Attributes:
        task: `truthful` or `refusal`.
        out: folder of all results, with the store of states.
        source: the model.
        data: folder of the data sets.
        sizes: how much of them.
        by: what TruthfulQA is split by.
        dtype: of the model's weights.
        device: where the model runs.
    """

    task: Task
    out: Path
    source: str
    data: Path
    sizes: Sizes
    by: str = "question"
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """Of the task's results."""
        return self.out / (self.task if self.by == "question" else f"{self.task}-by-{self.by}")

    @functools.cached_property
    def base(self) -> tuple[Any, Any]:
        """Model and tokenizer that fits are made on."""
        return load_model(self.source, self.dtype, self.device)

    @functools.cached_property
    def steered(self) -> Any:
        """The model that is asked."""
        return SteeredModelForCausalLM.from_model(load_model(self.source, self.dtype, self.device)[0])

    @functools.cached_property
    def general(self) -> GeneralData:
        """General prompts and texts."""
        return general_data(self.data, self.sizes)

    @functools.cached_property
    def halves(self) -> tuple[list[TruthfulQuestion], list[TruthfulQuestion]]:
        """TruthfulQA's questions, to fit on and held out."""
        return truthful_halves(self.data, self.sizes, self.by)

    @functools.cached_property
    def sets(self) -> dict[str, list[str]]:
        """Held-out prompts of the refusal task."""
        return asked(self.data, self.sizes)

    def plain(self) -> Condition:
        """The unsteered model."""
        return Condition(self.steered, self.base[1])

    def fit_data(self, kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Preference rows and general rows of the fit half."""
        if self.task == "truthful":
            return truthful_rows(self.halves[0], 4 if kind == "few" else 1), self.general.fit_rows()
        rows = refusal_rows(self.data, self.sizes)
        if kind != "look-alikes":
            return rows, self.general.fit_rows()
        unsafe = [p.prompt for p in xstest_split(self.data)[0] if p.harmful][: self.sizes.fit]
        safe = [p.prompt for p in xstest_split(self.data)[0] if not p.harmful][: self.sizes.fit]
        # XSTest has no answers: what the model would say is what is not wanted.
        own = self.plain().answers(unsafe, 24).texts
        rows += [
            refusal_row(f"xstest-{index}", prompt, text)
            for index, (prompt, text) in enumerate(zip(unsafe, own, strict=True))
            if text and not is_refusal(text)
        ]
        return rows, self.general.fit_rows(safe)


def write(file: Path, found: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(file, json.dumps(found) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text, whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def fitted(study: Study, row: Row) -> SteeringAdapter:
    """The row's adapter: from its folder, or fitted and saved there."""
    folder = study.folder / row.slug
    if (folder / CONFIG_NAME).exists():
        return SteeringAdapter.from_pretrained(folder)
    config = row.config() if row.config is not None else like_reference(study, row.changes or {})
    model, tokenizer = study.base
    rows, general_rows = study.fit_data(row.data)
    adapter = fit_steering(
        model,
        tokenizer,
        rows,
        config,
        general_dataset=general_rows,
        progress=False,
        seed=0,
        split=row.split,
        store_dir=study.out / "store" / study.folder.name,
    )
    if is_prepared(study.source):
        adapter.config.fit["base_weights"] = WEIGHTS
    adapter.save_pretrained(folder)
    return SteeringAdapter.from_pretrained(folder)


def like_reference(study: Study, changes: dict[str, Any]) -> SteeringConfig:
    """The settings that the reference row's fit has chosen, with some of them changed."""
    folder = study.folder / slug_of(REFERENCE)
    if not (folder / CONFIG_NAME).exists():
        raise RuntimeError(f"The row {REFERENCE} comes first: this one changes what its fit has chosen.")
    chosen = SteeringConfig.from_pretrained(folder)
    names = {field.name for field in dataclasses.fields(chosen)} - {"fit", "requires", "lora"}
    names -= {name for name in names if name.startswith(("base_model", "hidden", "num_hidden"))}
    return type(chosen)(**{name: getattr(chosen, name) for name in names} | changes)


@contextlib.contextmanager
def condition_of(study: Study, row: Row, clock: Clock) -> Iterator[tuple[Condition, dict[str, Any]]]:
    """The row as a way to ask, and what is told of how it was made."""
    plain = study.plain()
    if row.kind == "adapter":
        adapter = clock.run("fit", lambda: fitted(study, row))
        config = adapter.config.to_dict()
        shown = (
            "strength",
            "layer",
            "write_site",
            "positions",
            "experts",
            "residual_rank",
            "gate",
            "target",
            "refine",
        )
        facts = {
            "settings": {name: config[name] for name in shown if config.get(name) is not None},
            "fit_seconds": adapter.config.fit["seconds"],
            "capture": adapter.config.fit["capture"],
            "bytes": (study.folder / row.slug / "steering_model.safetensors").stat().st_size,
        }
        study.steered.load_steering(adapter, ADAPTER)
        try:
            yield dataclasses.replace(plain, adapter=ADAPTER), facts
        finally:
            study.steered.delete_steering(ADAPTER)
    elif row.kind == "lora":
        assert row.lora is not None
        rows, _ = study.fit_data(row.data)
        # LoRA goes into the layers of the model that it is trained on, so this one is not used again.
        model, tokenizer = load_model(study.source, study.dtype, study.device)
        folder = study.folder / row.slug
        how, settings = row.lora, Training()
        trained, facts = clock.run("fit", lambda: train(model, tokenizer, rows, how, folder, settings))
        yield Condition(trained, tokenizer, lora=True), facts
        del trained, model
        gc.collect()
    else:
        yield dataclasses.replace(plain, system=row.system), {}


def keep_questions(study: Study) -> None:
    """Write what was asked beside the results; refuse results of other sizes or of another model.

    Raises:
        SystemExit: if the folder holds results of another study.
    """
    file = study.folder / "study.json"
    settings = {
        "sizes": dataclasses.asdict(study.sizes),
        "by": study.by,
        "prepared": is_prepared(study.source),
        "dtype": str(study.dtype).removeprefix("torch."),
        # Figures of two devices are never mixed: in half precision they differ in the last digits.
        **({} if study.device == "cpu" else {"device": study.device}),
    }
    if file.exists():
        if json.loads(file.read_text())["settings"] != settings:
            raise SystemExit(f"{study.folder} holds results of other settings. Give another --out, or delete it.")
        return
    name = model_name(study.source)
    found: dict[str, Any] = {
        "settings": settings,
        "model": name,
        "general": study.general.held_out,
        "sources": study.general.sources,
    }
    if study.task == "truthful":
        test = study.halves[1]
        found["questions"] = [question.question for question in test]
        found["best"] = [question.best for question in test]
        found["rows"] = len(study.halves[0])
    else:
        found["sets"] = study.sets
        found["rows"] = len(refusal_rows(study.data, study.sizes))
    write(file, found)


def model_name(source: str) -> str:
    """What the page calls the model: of a folder only the last part, for where it lies is nobody's business."""
    if is_prepared(source):
        return f"{BASE}, {WEIGHTS}"
    return Path(source).name if Path(source).exists() else source
