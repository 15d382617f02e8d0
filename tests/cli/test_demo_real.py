"""The demo's first part, on the playground instead of the real model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from finesteer_hf import playground
from finesteer_hf.cli import common
from finesteer_hf.cli.demo import real as demo_real


CARDS = Path(__file__).resolve().parents[2] / "hub_cards"


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    for name, source in (("smollm2-truthful", "playground-truthful"), ("smollm2-safety", "playground-safety")):
        shutil.copytree(CARDS / source, tmp_path / name)
    return tmp_path


def test_every_prompt_is_answered_with_and_without(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_real, "console", Console(width=200))
    assert demo_real.show_real(Path(playground.model_path()), adapters)
    shown = capsys.readouterr().out
    prompts = [prompt for _, asked in demo_real.ASKED for prompt in asked]
    assert len(prompts) == 6 and all(prompt in shown for prompt in prompts)
    assert shown.count("unsteered:") == shown.count("gate ") == 6 and shown.count("  steered:") == 6


def test_without_the_model_it_says_so_and_goes_on(
    adapters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "errors", Console(width=200, stderr=True))
    assert not demo_real.show_real(adapters / "nowhere", adapters)
    assert "nowhere" in capsys.readouterr().err
