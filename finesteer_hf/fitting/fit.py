"""`fit_steering`: from preference rows to a steering adapter."""

from __future__ import annotations

import dataclasses
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finesteer_hf.adapters.adapter import SteeringAdapter, active_lora_names
from finesteer_hf.adapters.base_models import base_of
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.adapters.fingerprint import fingerprint
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.fitting.capture.captured import CapturedData, model_info
from finesteer_hf.fitting.capture.gradients import GradientReader
from finesteer_hf.fitting.capture.identity import model_identity
from finesteer_hf.fitting.capture.jobs import Job, make_jobs
from finesteer_hf.fitting.capture.processes import Processes
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.capture.reader import CaptureCount, Key, StateReader
from finesteer_hf.fitting.capture.store import ActivationStore
from finesteer_hf.fitting.data.encoding import AnswerEnd
from finesteer_hf.fitting.data.inputs import prepare_inputs
from finesteer_hf.fitting.data.lint import DatasetWarning, lint_memory
from finesteer_hf.fitting.data.records import DatasetLike
from finesteer_hf.fitting.data.splits import SplitBy
from finesteer_hf.fitting.data.templating import chat_template_hash
from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.fitting.progress import FitProgress
from finesteer_hf.method_api import PROMPT_POOLS, CaptureRequest
from finesteer_hf.methods._shared.objective import Limits
from finesteer_hf.sites import TextTower


# Enough for what is fitted: linear maps of a few thousand columns, and thresholds on a score.
MAX_ROWS = 20_000
RECORDED_PACKAGES = ("finesteer-hf", "torch", "transformers", "scikit-learn", "numpy")


def fit_steering(
    model: Any,
    tokenizer: Any,
    train_dataset: DatasetLike,
    config: SteeringConfig,
    *,
    eval_dataset: DatasetLike | None = None,
    general_dataset: DatasetLike | None = "default",
    batch_size: int | str = "auto",
    progress: bool = True,
    seed: int = 0,
    store_dir: str | Path | None = None,
    resume: bool = True,
    split: SplitBy = "prompt",
    answer_end: AnswerEnd = "include",
    max_length: int | None = None,
    max_rows: int | None = MAX_ROWS,
) -> SteeringAdapter:
    """Fit a steering adapter.

    Under `accelerate launch` or `torchrun` every process must call it, with the same data and the model on its own
    device: each runs its share of the texts through the model, and all return the same adapter as one process, up to
    rounding from different batches. For 4 GPUs: `accelerate launch --multi_gpu --num_processes 4 fit.py`, with the
    model on `accelerate.PartialState().device`. Without GPUs, or with the model on the CPU, the same command starts 4
    processes there (a script that creates the state then uses `PartialState(cpu=True)`), as does `torchrun
    --nproc-per-node 4 fit.py`; `accelerate launch --cpu` starts one.

    Args:
        model: the causal LM, as it will be steered (quantised, sharded, with LoRA). It is read unsteered and left
            unchanged.
        tokenizer: its tokenizer.
        train_dataset: rows `{"prompt", "chosen", "rejected"}` in TRL's preference format, text or chat messages, with
            an optional `category`; a list, a generator, a `datasets.Dataset` or `IterableDataset`, a file or a Hub id.
            It is read row by row, so it may be larger than memory.
        config: the method and its settings.
        eval_dataset: rows to validate on; None takes a fifth of the training prompts.
        general_dataset: rows `{"prompt"}` that must not be steered; `"default"` takes the packaged ones, None none.
            Plain text is put into the form of the training prompts.
        batch_size: texts per forward, or `auto`.
        progress: whether to show progress.
        seed: seed of splits and fits.
        store_dir: folder for the captured states: a killed fit continues from there, and other methods and settings
            reuse them. All processes must see it.
        resume: whether to use states that are already in `store_dir`; if not, they are captured again.
        split: what is held out: prompts, or whole categories (`group`).
        answer_end: whether the end of turn belongs to a chat answer (`include`, as in FineSteer's code) or not
            (`exclude`).
        max_length: most tokens of prompt and answer; longer answers are cut, longer prompts are an error.
        max_rows: most rows used of each data set. From a larger one, prompts with all their rows are drawn by a seeded
            hash of the prompt, up to this number of rows. The draw does not depend on the order of the rows, and a
            larger `max_rows` only adds prompts, so that stored states are reused. 20,000 by default: more rows barely
            improve a linear map of a few thousand columns, and each row costs forward passes. None uses all.

    Returns:
        The adapter, with data, versions and held-out figures in `config.fit`.

    Raises:
        DatasetError: for bad data, naming the rows, before the model runs; and for rows whose states are NaN or
            infinite.
        ValueError: for a config that does not match the model, or that sets fields which the fit writes.
        OSError: if `store_dir` is not writable.

    Example:
        >>> adapter = fit_steering(model, tokenizer, rows, FineSteerConfig())
        >>> adapter.save_pretrained("truthful")
    """
    if not isinstance(config, SteeringConfig):
        raise TypeError(f"config must be a SteeringConfig such as FineSteerConfig(), got {type(config).__name__}.")
    check_settings(config)
    started = time.perf_counter()
    limits = Limits.of(config.limits)
    method_cls = get_steering_method(config.steering_type).method_cls
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    tower = TextTower(model)
    info = model_info(tower)
    request = method_cls.needs(config, info)
    reader = StateReader(model, states_of(request), batch_size=batch_size)
    inputs = prepare_inputs(
        tokenizer,
        train_dataset,
        eval_dataset,
        general_dataset,
        seed=seed,
        split=split,
        answer_end=answer_end,
        max_length=max_length,
        max_positions=getattr(tower.config, "max_position_embeddings", None),
        max_rows=max_rows,
    )
    prepared = time.perf_counter()
    jobs = make_jobs(inputs.rows, inputs.general)
    findings = list(inputs.findings)
    if store_dir is None:
        width = sum(tower.width(site) for site in request.sites)
        passages = sum((job.prompt is not None) + len(job.answers) for job in jobs)
        findings += lint_memory(passages, width)
    for finding in findings:
        warnings.warn(finding, DatasetWarning, stacklevel=2)

    folder = None if store_dir is None else Path(store_dir)
    processes = Processes.current(cpu=reader.device.type == "cpu")
    with (
        FitProgress(progress and processes.is_main) as bars,
        ActivationStore(folder, model_identity(model), resume=resume, processes=processes) as store,
    ):
        reader.describe = inputs.describe
        capture_missing(reader, states_of(request), jobs, store, bars)
        if "gradient" in request.pools:
            # Each prompt's answers are read together, so it need not be cached.
            gradients = GradientReader(model, request.sites, PromptCache(model, most_bytes=0), inputs.describe)
            capture_gradients(gradients, jobs, store, bars)
        captured = time.perf_counter()
        data = CapturedData(
            info=info,
            seed=seed,
            limits=limits,
            tower=tower,
            store=store,
            rows=inputs.rows,
            general_prompts=inputs.general,
            split=inputs.split,
            general_split=inputs.general_split,
            row_prompts=inputs.prompts,
            row_units=inputs.units,
            row_kinds=inputs.kinds,
            row_texts=inputs.texts,
            general_texts=inputs.general_texts,
            dose=DoseRunner(
                model,
                [inputs.rows[i] for i in inputs.split.rows["validation"]],
                inputs.side_effects,
                seed,
                examples=[inputs.rows[i] for i in inputs.split.rows["fit"]] if inputs.split.held_out else (),
            ),
            bars=bars,
        )
        result = method_cls.fit(data, config)

    done = time.perf_counter()
    counts = processes.gather([reader.count])
    provenance = {
        **inputs.sources,
        "rows": inputs.split.sizes(),
        "general_rows": inputs.general_split.sizes() if inputs.general else None,
        "held_out": inputs.split.held_out,
        "seed": seed,
        "split": split,
        "answer_end": answer_end,
        "max_length": max_length,
        "max_rows": max_rows,
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template_sha256": chat_template_hash(tokenizer),
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
        "lint": findings,
        "capture": {
            field.name: sum(getattr(count, field.name) for count in counts)
            for field in dataclasses.fields(CaptureCount)
        },
        "seconds": {
            "read": round(prepared - started, 3),
            "capture": round(captured - prepared, 3),
            "fit": round(done - captured, 3),
        },
        "report": result.report,
    }
    base, commit = base_of(model)
    fitted = dataclasses.replace(
        result.config,
        base_model_name_or_path=base,
        base_model_revision=commit,
        base_model_fingerprint=fingerprint(model),
        base_model_type=tower.config.model_type,
        hidden_size=info.hidden_size,
        num_hidden_layers=info.num_layers,
        lora=active_lora_names(model),
        limits=limits.to_dict(),
        fit=provenance,
    )
    adapter = SteeringAdapter(fitted, result.tensors)
    adapter.check_tensors()
    return adapter


def check_settings(config: SteeringConfig) -> None:
    """Refuse a config that sets fields which the fit writes: they would be silently overwritten.

    Raises:
        ValueError: naming these fields.
    """
    kind = type(config)
    # Some fields follow from the settings (`requires`): a fresh config has the same ones.
    fresh = kind(**config.settings())
    written = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(fresh, f.name)]
    if written:
        raise ValueError(
            f"{written} of {kind.__name__} are written by the fit and are not settings: they come from the model, the data "
            f"and the fit's choices. Leave them out, or fit `{kind.__name__}(**config.settings())`, the settings alone of "
            f"a fitted config. Settings: {sorted(kind.setting_fields())}."
        )


def states_of(request: CaptureRequest) -> CaptureRequest:
    """The part of a request that is read without gradients."""
    return CaptureRequest(request.sites, tuple(pool for pool in request.pools if pool != "gradient"))


def capture_gradients(reader: GradientReader, jobs: list[Job], store: ActivationStore, bars: FitProgress) -> None:
    """Read the gradients of the jobs' answers that a store lacks; arguments as for `capture_missing`."""
    keys: list[Key] = [(site, "gradient") for site in reader.probe.maps]
    answers = dict.fromkeys(answer for job in jobs for answer in job.answers)
    missing = store.processes.share([answer for answer in answers if store.lacks(answer, keys)])
    with bars.task("reading gradients", len(missing)) as advance:
        for batch in reader.read(missing, advance):
            store.add(batch)
    store.join()


def capture_missing(
    reader: StateReader, request: CaptureRequest, jobs: list[Job], store: ActivationStore, bars: FitProgress
) -> CaptureCount:
    """Capture only what a store lacks.

    Jobs that lack the same sites are read together: a resumed capture lacks rows, a second method lacks sites.

    Args:
        reader: reads the sites of the request.
        request: what the store must contain.
        jobs: prompts with their answers.
        store: receives the states; each process reads its share, and all have all states at the end.
        bars: shows progress.

    Returns:
        Statistics of this process.
    """
    keys: list[Key] = [(site, pool) for site in request.sites for pool in request.pools]
    query = [key for key in keys if key[1] in PROMPT_POOLS]
    answer = [key for key in keys if key[1] not in PROMPT_POOLS]
    missing: dict[frozenset[Key], list[Job]] = {}
    for job in jobs:
        prompt_lacks = store.lacks(job.prompt, query) if job.prompt is not None else set()
        answers = {a: store.lacks(a, answer) for a in job.answers}
        lacks = frozenset(prompt_lacks.union(*answers.values()))
        if lacks:
            missing.setdefault(lacks, []).append(Job(job.prompt, tuple(a for a, keys in answers.items() if keys)))
    own = [job for group in missing.values() for job in store.processes.share(group)]
    total = sum((job.prompt is not None) + len(job.answers) for job in own)
    with bars.task("reading states", total) as advance:
        for lacks, group in missing.items():
            part = CaptureRequest(
                tuple(site for site in request.sites if any(site == key[0] for key in lacks)),
                tuple(pool for pool in request.pools if any(pool == key[1] for key in lacks)),
            )
            reader_of_part = reader if part == request else reader.for_request(part)
            for batch in reader_of_part.read(store.processes.share(group), advance, among=jobs):
                store.add(batch)
    store.join()
    return reader.count
