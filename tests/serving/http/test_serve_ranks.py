"""Tensor parallel: two ranks under torchrun, rank 0 answers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from server_toys import ADAPTERS, QUESTIONS, eventually
from typer.testing import CliRunner

from finesteer_hf.cli.commands import app


@pytest.mark.slow
def test_two_ranks_say_what_one_says_and_end_together(alone: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "finesteer_hf", "serve", "playground", "--tp", "--port", "0", "--drain-seconds", "5"]
    command += [part for name, folder in ADAPTERS.items() for part in ("--steering", f"{name}={folder}")]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        found: list[str] = []

        def up() -> bool:
            found[:] = re.findall(r" at (http://127\.0\.0\.1:\d+)/v1", log.read_text())
            return bool(found) or process.poll() is not None

        assert eventually(up, 90) and found, log.read_text()[-2000:]
        client = openai.OpenAI(base_url=f"{found[0]}/v1", api_key="unused", max_retries=0, timeout=60)
        answers: dict[Any, str] = {}

        def one(question: str, steering: str | None) -> None:
            answer = client.chat.completions.create(
                model="playground",
                messages=[{"role": "user", "content": question}],
                max_tokens=32,
                temperature=0,
                extra_body={"steering": steering},
            )
            answers[question, steering] = answer.choices[0].message.content

        cases = [(question, steering) for question in QUESTIONS[:4] for steering in (None, *ADAPTERS)]
        threads = [threading.Thread(target=one, args=case) for case in cases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert answers == {case: alone(*case, length=32) for case in cases}
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) >= 2
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert eventually(lambda: not any(rank.is_running() for rank in ranks), 30)
        assert '"message": "drained"' in log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(20)


def test_without_torchrun_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", "playground", "--tp"])
    assert done.exit_code == 1 and "torchrun --nproc-per-node" in done.stderr
