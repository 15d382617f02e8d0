"""`finesteer serve` as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from server_toys import ADAPTERS, QUESTIONS
from transformers import GenerationConfig
from typer.testing import CliRunner

from finesteer_hf.cli.commands import app
from finesteer_hf.cli.services.serve import adapter_of, default_scales, not_applied
from finesteer_hf.serving.http.server import bound


CHAT: Any = [{"role": "user", "content": QUESTIONS[0]}]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = ["serve", "playground", "--port", "0", "--default", "truthful=1.5", "--drain-seconds", "20"]
    arguments += ["--batching", "num_blocks=64"]
    for name, folder in ADAPTERS.items():
        arguments += ["--steering", f"{name}={folder}"]
    environment = {**os.environ, "FINESTEER_API_KEY": "secret-key", "COLUMNS": "200"}
    started = subprocess.Popen(
        [sys.executable, "-m", "finesteer_hf", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    yield started
    if started.poll() is None:
        started.kill()
    started.wait(20)
    assert started.stderr is not None
    started.stderr.close()


def test_it_serves_and_finishes_what_runs_on_sigterm(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    url = None
    for line in process.stderr:
        if found := re.search(r"at (http://127\.0\.0\.1:\d+/v1)", line):
            url = found[1]
            break
    assert url is not None
    client = openai.OpenAI(base_url=url, api_key="secret-key", max_retries=0, timeout=60)
    answer = client.chat.completions.create(model="playground", messages=CHAT, max_tokens=48, temperature=0)
    assert answer.steering["truthful"]["scale"] == 1.5  # type: ignore[attr-defined]
    stream = iter(
        client.chat.completions.create(
            model="playground", messages=CHAT, max_tokens=150, temperature=0, logit_bias={"1331": 100}, stream=True
        )
    )
    next(stream)
    process.send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert process.wait(30) == 0
    logged = [json.loads(line) for line in process.stderr if line.startswith("{")]
    assert [line["message"] for line in logged if line["message"].startswith("drain")] == ["draining", "drained"]
    assert [line["status"] for line in logged if line["message"] == "request"] == [200, 200]
    assert "secret-key" not in json.dumps(logged) and "bats" not in json.dumps(logged)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--steering", "truthful"], "write name=adapter or name@version=adapter"),
        (["--steering", "a@=x"], "write name=adapter or name@version=adapter"),
        (["--default", "nobody"], "none is given"),
        (["--batching", "num_block=4"], "num_blocks"),
        (["--steering", "a=no/such/folder/at/all"], "no/such/folder"),
    ],
)
def test_what_cannot_be_started_is_told(arguments: list[str], match: str) -> None:
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["serve", "playground", *arguments])
    assert done.exit_code == 1
    assert match in done.stderr


def test_a_port_that_is_taken_is_told_before_anything_is_loaded() -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "no-such-model", "--port", port])
    assert done.exit_code == 1 and f"port {port} cannot be listened on" in done.stderr


def test_settings_of_the_models_own_that_do_not_apply_are_told() -> None:
    assert not_applied(GenerationConfig(repetition_penalty=1.05, temperature=0.6, eos_token_id=2)) == [
        "repetition_penalty=1.05"
    ]
    assert not_applied(GenerationConfig()) == []


def test_options_are_read() -> None:
    assert adapter_of("a=org/a@v2") == ("a", None, "org/a@v2")
    assert adapter_of("a@v1=folder=1") == ("a", "v1", "folder=1")
    assert default_scales(["a", "b@v2=-0.5"], ["a", "b"]) == {"a": 1.0, "b@v2": -0.5}
    with pytest.raises(ValueError, match="is no number"):
        default_scales(["a=much"], ["a"])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finesteer_hf.serving.http.find_spec", lambda name: None if name == "uvicorn" else name)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "playground"])
    assert done.exit_code == 1
    assert "Serving needs uvicorn: pip install 'finesteer-hf[serve]'" in done.stderr
