"""The page as gradio builds it, and the command that opens it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from finesteer_hf.cli.commands import app
from finesteer_hf.cli.services.ui import named
from finesteer_hf.ui.workbench import Workbench


ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "hub_cards" / "space"


def test_the_page_fetches_nothing(bench: Workbench) -> None:
    pytest.importorskip("gradio", reason="needs the extra ui")
    from finesteer_hf.ui.page import build_page, launch

    page = build_page(bench)
    try:
        address = launch(page)
        with urllib.request.urlopen(address, timeout=30) as answer:
            html = answer.read().decode()
        with urllib.request.urlopen(f"{address}theme.css", timeout=30) as answer:
            theme = answer.read().decode()
    finally:
        page.close()
    assert "finesteer: playground" in html
    assert not re.findall(r"url\(['\"]?https?://", theme) and "@import" not in theme


def test_names_of_adapters_on_the_command_line() -> None:
    given = ["a=org/x@v1", "out/truthful", "org/kind@v2", "b=./c=d"]
    expected = {"a": "org/x@v1", "truthful": "out/truthful", "kind": "org/kind@v2", "b": "./c=d"}
    assert named(given) == expected
    with pytest.raises(ValueError, match="two adapters are called 'x'"):
        named(["org/x", "me/x"])
    with pytest.raises(ValueError, match="name=adapter"):
        named(["a="])


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gradio", "finesteer_hf.ui.page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["ui", "playground"])
    assert result.exit_code == 1 and "pip install 'finesteer-hf[ui]'" in result.output


def test_the_space_s_versions_are_those_of_the_project() -> None:
    front = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line)
    assert front["sdk_version"] == pins["gradio"]
    assert (SPACE / front["app_file"]).is_file() and len(front["short_description"]) <= 60
    assert (SPACE / "requirements.txt").read_text() == "finesteer-hf[ui]\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "adapters"),
    [("playground", "playground"), pytest.param(str(ROOT / "out/real/model"), "smollm2", marks=pytest.mark.real)],
)
def test_the_space_starts_offline(model: str, adapters: str) -> None:
    pytest.importorskip("gradio", reason="needs the extra ui")
    if model != "playground" and not Path(model, "config.json").is_file():
        pytest.skip("needs the real model: make real-model")
    settings = {"FINESTEER_MODEL": model, "GRADIO_SERVER_PORT": "7893", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=SPACE, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "with [" in line:
                break
        assert f"with ['{adapters}-safety', '{adapters}-truthful']" in lines[-1], lines
        assert sum("left out" in line for line in lines) == 2
        with urllib.request.urlopen("http://127.0.0.1:7893/", timeout=30) as answer:
            assert answer.status == 200
    finally:
        process.kill()
        process.wait()
