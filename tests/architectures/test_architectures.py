"""Every architecture behaves as docs/architectures.md says; a few of each kind run in the quick suite."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from finesteer_hf.testing.architecture_checks import CHECKS
from finesteer_hf.testing.architectures import run_architecture
from finesteer_hf.testing.tiny_models import architectures


PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
QUICK = (
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "GPTNeoXForCausalLM",
    "FalconForCausalLM",
    "BloomForCausalLM",
    "MixtralForCausalLM",
    "DeepseekV3ForCausalLM",
    "MambaForCausalLM",
    "FalconH1ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
)


def documented() -> dict[str, str]:
    """The verdict on each class of the page."""
    verdicts = {"Conforming": "conforms", "Refused": "refused", "Not run": "not run", "Failing": "fails"}
    found, title = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            title = line[3:]
        match = re.match(r"\| (\w+) \|", line)
        if title in verdicts and match and match.group(1) != "class":
            found[match.group(1)] = verdicts[title]
    return found


def same_transformers() -> bool:
    """Whether the page was written with the installed transformers."""
    return f"transformers {importlib.metadata.version('transformers')}," in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", QUICK)
def test_architecture_conforms(name):
    report = run_architecture(name)
    assert report.verdict == "conforms", report.reason
    assert list(report.checks) == [*CHECKS, "unload"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architectures() if name not in QUICK])
def test_architecture_does_what_the_page_says(name):
    report = run_architecture(name)
    assert report.verdict != "fails", report.reason
    if same_transformers():
        assert report.verdict == documented()[name], report.reason


def test_at_least_sixty_architectures_conform():
    verdicts = list(documented().values())
    assert verdicts.count("conforms") >= 60
    assert "fails" not in verdicts


def test_the_page_knows_every_class():
    if not same_transformers():
        pytest.skip("the page was written with another transformers")
    assert set(documented()) == set(architectures())
