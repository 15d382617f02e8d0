"""Run the same checks on every causal-LM architecture of transformers, with tiny random weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch

from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.model.auto import SteeredModelForCausalLM
from finesteer_hf.testing.architecture_checks import CHECKS, Fingerprint, check_unload
from finesteer_hf.testing.architecture_subject import Subject
from finesteer_hf.testing.tiny_models import VOCAB, tiny_model


Verdict = Literal["conforms", "refused", "not run", "fails"]

# Classes that do not generate text from text on their own.
NOT_TEXT_TO_TEXT: dict[str, str] = {
    **dict.fromkeys(
        (
            *("BlipForConditionalGeneration", "Blip2ForConditionalGeneration", "IdeficsForVisionText2Text"),
            *("InstructBlipForConditionalGeneration", "InstructBlipVideoForConditionalGeneration"),
            *("Kosmos2ForConditionalGeneration", "VisionEncoderDecoderModel"),
        ),
        "generates from an image only",
    ),
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        "drafts for another model from that model's states",
    ),
    **dict.fromkeys(
        ("Florence2ForConditionalGeneration", "PPFormulaNetForConditionalGeneration"),
        "an encoder-decoder that reads images",
    ),
    "PI0ForConditionalGeneration": "generates a robot's actions",
}


@dataclass
class ArchitectureReport:
    """Results of the checks on one architecture.

    Attributes:
        name: the model class.
        verdict: `conforms` if no check fails; `refused` if it raises `UnsupportedModelError`; `not run` if no tiny
            model could be built or the model does not generate text on its own; `fails` otherwise.
        reason: the reason, unless it conforms.
        blocks: where the blocks are in the model.
        checks: for each check that ran, an empty string if it holds, else why there was nothing to check.
        failures: for each check that fails, its message.
    """

    name: str
    verdict: Verdict
    reason: str = ""
    blocks: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def run_architecture(class_name: str) -> ArchitectureReport:
    """Build a tiny model of a class, steer it, run every check, and unload."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return _run(class_name)


def _run(class_name: str) -> ArchitectureReport:
    if class_name in NOT_TEXT_TO_TEXT:
        return ArchitectureReport(class_name, "not run", NOT_TEXT_TO_TEXT[class_name])
    try:
        model = tiny_model(class_name)
    except Exception as error:  # any error of the model itself, including a missing library
        return ArchitectureReport(class_name, "not run", _short(error))
    before = Fingerprint.of(model)
    try:
        subject = Subject(SteeredModelForCausalLM.from_model(model), VOCAB)
    except UnsupportedModelError as error:
        assert Fingerprint.of(model) == before, f"{class_name} is refused, but was changed"
        return ArchitectureReport(class_name, "refused", str(error))
    try:
        subject.say(subject.ids)
    except Exception as error:
        return ArchitectureReport(class_name, "not run", f"unsteered, {_short(error)}")
    try:
        subject.say(subject.ids, **subject.constant())
    except UnsupportedModelError as error:
        return ArchitectureReport(class_name, "refused", str(error))
    blocks = next(name for name, module in model.named_modules() if module is subject.blocks)
    report = ArchitectureReport(class_name, "conforms", blocks=blocks)
    for name, check in CHECKS.items():
        try:
            report.checks[name] = check(subject) or ""
        except Exception as error:
            report.failures[name] = _short(error)
    try:
        check_unload(subject, before)
        report.checks["unload"] = ""
    except Exception as error:
        report.failures["unload"] = _short(error)
    if report.failures:
        report.verdict = "fails"
        report.reason = "; ".join(f"{name}: {text}" for name, text in report.failures.items())
    return report


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:160] if isinstance(error, AssertionError) else f"{type(error).__name__}: {text[:160]}"
