"""`fit_steering`: from preference rows to a steering adapter."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from finesteer_hf.adapter import SteeringAdapter, active_lora_names
from finesteer_hf.config import SteeringConfig, get_steering_method
from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.capture import StateReader
from finesteer_hf.fitting.captured import CapturedData, model_info
from finesteer_hf.fitting.data import (
    DatasetLike,
    DataSource,
    PreferenceRow,
    Text,
    check_contrast,
    parse_preferences,
    parse_prompts,
    prompt_key,
    read_records,
)
from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.fitting.general import default_general_prompts
from finesteer_hf.fitting.lint import lint_preferences
from finesteer_hf.fitting.splits import SplitBy, split_rows, split_units
from finesteer_hf.fitting.store import ActivationStore, model_identity
from finesteer_hf.fitting.templating import AnswerEnd, chat_template_hash, encode_preferences, encode_prompts
from finesteer_hf.methods.base import CaptureRequest
from finesteer_hf.sites import TextTower


def fit_steering(
    model: Any,
    tokenizer: Any,
    train_dataset: DatasetLike,
    config: SteeringConfig,
    *,
    eval_dataset: DatasetLike | None = None,
    general_dataset: DatasetLike | None = "default",
    batch_size: int | str = "auto",
    split: SplitBy = "prompt",
    answer_end: AnswerEnd = "include",
    max_length: int | None = None,
    store_dir: str | Path | None = None,
    progress: bool = True,
    seed: int = 0,
) -> SteeringAdapter:
    """Fit a steering adapter.

    Args:
        model: the causal LM, as it will be steered (quantised, sharded, with LoRA). It is read unsteered and unchanged.
        tokenizer: its tokenizer.
        train_dataset: rows `{"prompt", "chosen", "rejected"}` in TRL's preference format, text or chat messages, with an
            optional `category`; a list, a `datasets.Dataset`, a file or a Hub id.
        config: the method and its settings.
        eval_dataset: rows to validate on; None takes a fifth of the training prompts.
        general_dataset: rows `{"prompt"}` that must not be steered; `"default"` takes the packaged ones, None none.
        batch_size: padded tokens a batch, or `auto`.
        split: whether prompts or whole categories are held out.
        answer_end: whether the end of turn belongs to an answer.
        max_length: most tokens of prompt and answer; longer answers are cut, longer prompts are errors.
        store_dir: folder for the captured states: a fit that was killed continues there, and other methods reuse it.
        progress: whether to show progress.
        seed: of splits and fits.

    Returns:
        The adapter, with data, versions and held-out figures in `config.fit`.

    Raises:
        DatasetError: for data that cannot be fitted, naming the rows, before the model runs.
        ValueError: for a config that does not fit the model.
    """
    if not isinstance(config, SteeringConfig):
        raise TypeError(f"config must be a SteeringConfig such as FineSteerConfig(), got {type(config).__name__}.")
    started = time.perf_counter()
    method_cls = get_steering_method(config.steering_type).method_cls
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = TextTower(model)
    info = model_info(model, tower)
    request = method_cls.needs(config, info)
    limits: dict[str, Any] = {
        "max_length": max_length,
        "max_positions": getattr(tower.config, "max_position_embeddings", None),
    }

    rows, source, eval_source = _read_preferences(train_dataset, eval_dataset)
    general, general_source = _read_general(general_dataset, tokenizer)
    evaluated = 0 if eval_source is None else eval_source.rows
    encoded = encode_preferences(tokenizer, rows, answer_end=answer_end, **limits)
    prompts = encode_prompts(tokenizer, general, **limits)
    lint = lint_preferences(rows, encoded, evaluated)
    for finding in lint:
        warnings.warn(finding, stacklevel=2)
    trained = rows[: len(rows) - evaluated]
    keys = [prompt_key(row.prompt) for row in rows]
    groups = None if rows[0].group is None else [str(row.group) for row in trained]
    parts = split_rows([prompt_key(row.prompt) for row in trained], groups, seed, by=split, validation_rows=evaluated)
    if not parts.held_out:
        lint.append("too few prompts to hold any out: the figures are in-sample")
        warnings.warn(f"train_dataset has too few prompts to hold any out; {lint[-1]}.", stacklevel=2)
    general_parts = split_units([prompt_key(prompt) for prompt in general], seed) if general else None

    reader = StateReader(model, request, None if batch_size == "auto" else int(batch_size))
    identity = model_identity(model) | {"chat_template": chat_template_hash(tokenizer), "answer_end": answer_end}
    folder = None if store_dir is None else Path(store_dir)
    store = ActivationStore("preferences", len(rows), identity | {"data": _digest(encoded.rows)}, folder)
    general_store = (
        ActivationStore("general", len(prompts), identity | {"data": _digest(prompts)}, folder) if prompts else None
    )
    with _Progress(progress) as bar:
        _capture(reader, request, store, encoded.rows, general_store, prompts, bar)
        captured = time.perf_counter()
        held_out = [encoded.rows[i] for i in parts.rows["validation"]]
        held_prompts = [prompts[i] for i in general_parts.rows["validation"]] if general_parts is not None else []
        data = CapturedData(
            info,
            seed,
            store,
            general_store,
            parts,
            general_parts,
            keys,
            keys if split == "prompt" else [str(row.group) for row in rows],
            DoseRunner(model, held_out, held_prompts),
            bar.say,
        )
        result = method_cls.fit(data, config)

    fitted = result.config
    fitted.base_model_name_or_path = getattr(model.config, "_name_or_path", "") or None
    fitted.base_model_revision = getattr(model.config, "_commit_hash", None)
    fitted.base_model_type = tower.config.model_type
    fitted.hidden_size, fitted.num_hidden_layers = info.hidden_size, info.num_layers
    fitted.lora = active_lora_names(model)
    fitted.fit = {
        "data": source.to_dict(),
        "eval_data": None if eval_source is None else eval_source.to_dict(),
        "general_data": None if general_source is None else general_source.to_dict(),
        "rows": parts.sizes(),
        "general_rows": None if general_parts is None else general_parts.sizes(),
        "split": split,
        "held_out": parts.held_out,
        "seed": seed,
        "chat_template_sha256": chat_template_hash(tokenizer),
        "answer_end": answer_end,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn", "numpy")},
        "lint": lint,
        "seconds": {"capture": round(captured - started, 3), "fit": round(time.perf_counter() - captured, 3)},
        "report": result.report,
    }
    adapter = SteeringAdapter(fitted, result.tensors)
    adapter.check_tensors()
    return adapter


def _read_preferences(
    train: DatasetLike, evaluation: DatasetLike | None
) -> tuple[list[PreferenceRow], DataSource, DataSource | None]:
    records, source = read_records(train)
    rows = parse_preferences(records)
    check_contrast(rows)
    if evaluation is None:
        return rows, source, None
    records, eval_source = read_records(evaluation, "eval_dataset")
    held_out = parse_preferences(records, "eval_dataset")
    if (held_out[0].group is None) != (rows[0].group is None):
        raise DatasetError("Either both train_dataset and eval_dataset have a category, or neither has one.")
    return rows + held_out, source, eval_source


def _read_general(dataset: DatasetLike | None, tokenizer: Any) -> tuple[list[Text], DataSource | None]:
    if dataset is None:
        return [], None
    if isinstance(dataset, str) and dataset == "default":
        prompts = default_general_prompts()
        digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        chat = getattr(tokenizer, "chat_template", None) is not None
        texts: list[Text] = [[{"role": "user", "content": p}] if chat else p for p in prompts]
        return texts, DataSource("default", digest, len(texts))
    records, source = read_records(dataset, "general_dataset")
    return parse_prompts(records), source


def _digest(passages: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(repr(passage).encode())
    return digest.hexdigest()


def _capture(
    reader: StateReader,
    request: CaptureRequest,
    store: ActivationStore,
    rows: Sequence[Any],
    general_store: ActivationStore | None,
    prompts: Sequence[Any],
    bar: _Progress,
) -> None:
    pools = [pool for pool in request.pools if pool != "query"]
    names = ["query", *(f"{side}/{pool}" for side in ("chosen", "rejected") for pool in pools)]
    keys = [(site, name) for site in request.sites for name in names]
    with bar.task(
        "states of the rows", sum(min(store.shard_rows, store.rows - s) for s in store.missing(keys))
    ) as advance:
        store.fill(keys, lambda start, stop: reader.read_rows(rows[start:stop], advance))
    if general_store is not None:
        keys = [(site, "query") for site in request.sites]
        with bar.task("states of general prompts", len(prompts) if general_store.missing(keys) else 0) as advance:
            general_store.fill(keys, lambda start, stop: reader.read_prompts(prompts[start:stop], advance))


class _Progress:
    """A progress bar, or silence."""

    def __init__(self, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, disable=not shown, transient=True)
        self.shown = shown

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def say(self, message: str) -> None:
        if self.shown:
            self.bar.console.print(message)

    def task(self, description: str, total: int) -> Any:
        import contextlib

        @contextlib.contextmanager
        def running() -> Any:
            task = self.bar.add_task(description, total=total)
            yield lambda rows: self.bar.advance(task, rows)
            self.bar.update(task, completed=total)

        return running()
