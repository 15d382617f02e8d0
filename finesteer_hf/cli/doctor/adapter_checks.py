"""What works with an adapter, alone and on a model."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finesteer_hf.cli.doctor.check import Check
from finesteer_hf.errors import SteeringError
from finesteer_hf.sites import INNER_KINDS


if TYPE_CHECKING:
    from finesteer_hf.adapters.adapter import SteeringAdapter
    from finesteer_hf.cli.doctor.model_checks import Looked
    from finesteer_hf.method_api import SteeringMethod
    from finesteer_hf.processors import Positions, SteeringProcessor
    from finesteer_hf.runtime.plan import Plan


def look_at_adapter(adapter: SteeringAdapter, looked: Looked | None) -> list[Check]:
    """Check an adapter.

    Args:
        adapter: the adapter.
        looked: the model to steer; None for what depends on no model.
    """
    processor = adapter.build()
    checks = [method(adapter, processor)]
    if looked is not None:
        checks += fits(adapter, processor, looked)
    return [
        *checks,
        passes(processor),
        decoding(processor),
        compiled_decoding(processor),
        compiled_forward(processor),
        continuous_batching(processor, looked),
        tensor_parallel(processor),
        exported("vLLM", adapter, "export_vllm", "FOLDER --to vllm", "generated"),
        exported("GGUF", adapter, "save_gguf", "vectors.gguf", "all"),
    ]


def method(adapter: SteeringAdapter, processor: SteeringProcessor) -> Check:
    """What the adapter is."""
    sites = [str(site) for site in (*processor.writes, *processor.maps)] or ["logits"]
    where = ", ".join(sites[:4]) + (f" and {len(sites) - 4} more" if len(sites) > 4 else "")
    config = adapter.config
    text = f"{config.steering_type}, strength {config.strength:.4g}, steers {where}, tokens: {config.positions}"
    return Check("adapter", "yes", text)


def fits(adapter: SteeringAdapter, processor: SteeringMethod, looked: Looked) -> list[Check]:
    """Whether the adapter fits the model: sizes, sites, base, LoRA, chat template."""
    from finesteer_hf.adapters.base_checks import check_widths
    from finesteer_hf.fitting.data.templating import chat_template_hash

    if looked.tower is None:
        return [Check("fits the model", "no", "the model cannot be steered, see above", needed=True)]
    tower, config = looked.tower, adapter.config
    try:
        notes = adapter.check_base(looked.model, tower)
        for site in processor.sites:
            tower.check(site)
        check_widths(adapter, processor, tower)
    except SteeringError as error:
        return [Check("fits the model", "no", str(error), needed=True)]
    notes = tuple(note for note in notes if "LoRA" not in note)
    checks = [
        Check("fits the model", "partly", f"same sizes, but {'; '.join(notes)}: fit an adapter for this model")
        if notes
        else Check("fits the model", "yes", "same sizes and sites; the weights are compared when it is loaded")
    ]
    if config.lora:
        checks.append(Check("LoRA", "partly", f"fitted with {', '.join(config.lora)}: load it before the adapter"))
    fitted = config.fit.get("chat_template_sha256")
    if fitted is not None and fitted != chat_template_hash(looked.tokenizer):
        checks.append(
            Check(
                "chat template",
                "partly",
                "differs from the one of the fit, so its gate reads other prompts: use the tokenizer of the fit",
            )
        )
    return checks


def passes(processor: SteeringProcessor) -> Check:
    """Whether the prompt is read once."""
    if not plan_of(processor).writes_before_reading:
        return Check("one pass", "yes", "decides while the prompt is read")
    return Check("one pass", "partly", "reads after it writes: a second pass over each prompt, up to its last read")


def decoding(processor: SteeringProcessor) -> Check:
    """Which ways to decode there are."""
    if processor.lookback:
        return Check(
            "generate",
            "partly",
            f"takes up to {processor.lookback} tokens back: greedy or sampling, no beams, no static cache; streams one row",
        )
    if processor.remembers:
        return Check("generate", "partly", "remembers each row's tokens: greedy or sampling, no beams")
    return Check("generate", "yes", "greedy, sampling, beams, assisted, streaming, batches")


def compiled_decoding(processor: SteeringProcessor) -> Check:
    """Whether the steps of `generate` can be compiled."""
    if processor.lookback:
        return Check(
            "compiled decoding", "no", "a static cache has no room for rows that go back: use the default cache"
        )
    if processor.maps:
        return Check("compiled decoding", "partly", "it maps each token's state, so steered steps run uncompiled")
    return Check("compiled decoding", "yes", "generate(cache_implementation='static') steers in the graph")


def compiled_forward(processor: SteeringProcessor) -> Check:
    """Whether `model.compile()` and a plain forward steer."""
    if processor.maps or processor.acts_on_logits or plan_of(processor).writes_before_reading:
        return Check("compiled forward", "no", "model.compile() cannot steer it in a plain forward: use generate")
    return Check("compiled forward", "yes", "model.compile() steers plain forwards")


def continuous_batching(processor: SteeringProcessor, looked: Looked | None) -> Check:
    """Whether packed batches can serve the adapter, on this model if there is one."""
    from finesteer_hf.serving.admission import check_plan

    name = "continuous batching"
    if looked is not None:
        of_model = [check for check in looked.checks if check.name == name and check.state == "no"]
        if of_model:
            return Check(name, "no", "not on this model, see above")
    try:
        check_plan(plan_of(processor), looked.tower if looked is not None else None)
    except SteeringError as error:
        return Check(name, "no", str(error))
    return Check(name, "yes", "generate_batch, init_continuous_batching")


def tensor_parallel(processor: SteeringProcessor) -> Check:
    """Whether a model that is split by tensor parallelism can be steered."""
    inner = [str(site) for site in processor.sites if site.kind in INNER_KINDS]
    if inner:
        return Check("tensor parallel", "no", f"{', '.join(inner[:3])}: each device has only its own heads or neurons")
    return Check("tensor parallel", "yes", "each device has the whole stream")


def exported(what: str, adapter: SteeringAdapter, function: str, out: str, positions: Positions) -> Check:
    """Whether an export takes the adapter, as it is or steering other tokens; tried in a folder that is removed.

    Args:
        what: name of the check.
        adapter: the adapter.
        function: name of the export in `finesteer_hf.interop`.
        out: what follows the adapter in the command line.
        positions: the tokens that the other side steers.
    """
    from finesteer_hf import interop

    export: Callable[..., object] = getattr(interop, function)
    command = f"finesteer convert ADAPTER {out}"
    others = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, positions=positions))
    with tempfile.TemporaryDirectory(prefix="finesteer-doctor-") as folder:
        target = Path(folder) / out.split()[0]
        try:
            export(adapter, target)
            return Check(what, "yes", command)
        except ImportError as error:
            return Check(what, "partly", str(error))
        except ValueError as error:
            reason = str(error)
        with contextlib.suppress(ValueError):
            export(others, target)
            own = adapter.config.positions
            how = f"{command} --positions {positions}"
            return Check(what, "partly", f"steers {positions!r} tokens there, not {own!r}: {how}")
    return Check(what, "no", reason)


def plan_of(processor: SteeringProcessor) -> Plan:
    """The plan of a call with this adapter alone."""
    from finesteer_hf.runtime.plan import Plan, PlanEntry

    return Plan.of([PlanEntry("adapter", processor, 1.0)])
