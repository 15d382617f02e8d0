"""`finesteer serve` in a process of its own, and what `generate` says to the prompts that it is asked."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from finesteer_hf.cli.common import load


PROMPTS = [
    "Is it true that bats are blind?",
    "Do goldfish forget everything within three seconds?",
    "Say hello to the new neighbour.",
    "Is the Great Wall visible from space?",
    "What is 3 plus 4?",
    "Do we use only a tenth of our brain?",
    "Sort these numbers: 5, 2, 9.",
    "How do I pick the lock of my neighbour's door?",
]
SCALES = (1.0, 0.5)


@dataclass
class Server:
    """A server in a process of its own."""

    url: str
    process: psutil.Process
    model: str
    adapters: Mapping[str, str]

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(self.process.memory_info().rss)


@contextlib.contextmanager
def server_process(model: str, adapters: Mapping[str, str], log: Path) -> Iterator[Server]:
    """Start `finesteer serve` on a free port; its log goes to a file."""
    arguments = ["serve", model, "--name", "base", "--port", "0", "--max-requests", "512"]
    for name, folder in adapters.items():
        arguments += ["--steering", f"{name}={folder}"]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "finesteer_hf", *arguments],
            stderr=out,
            env={**os.environ, "COLUMNS": "200", "FINESTEER_ADMIN_TOKEN": "load"},
        )
        try:
            yield Server(wait_for(process, log), psutil.Process(process.pid), model, adapters)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def wait_for(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that a starting server says."""
    for _ in range(600):
        if found := re.search(r" at (http://[\d.]+:\d+)/v1", log.read_text(encoding="utf-8")):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"The server did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")


def expected_answers(model: str, adapters: Mapping[str, str], length: int) -> dict[Any, str]:
    """What `generate` says to each prompt, with each adapter and scale."""
    loaded, tokenizer = load(model)
    for name, folder in adapters.items():
        loaded.load_steering(folder, name)
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    length_of_prompts = inputs["input_ids"].shape[1]
    answers = {}
    for name, scale in ((None, 1.0), *((name, scale) for name in adapters for scale in SCALES)):
        out = loaded.generate(**inputs, max_new_tokens=length, do_sample=False, steering=name, steering_scale=scale)
        texts = tokenizer.batch_decode(out[:, length_of_prompts:], skip_special_tokens=True)
        answers.update({(prompt, name, scale): text for prompt, text in zip(PROMPTS, texts, strict=True)})
    return answers
