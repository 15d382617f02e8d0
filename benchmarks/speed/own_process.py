"""What a call takes, measured in a process of its own, so that its memory is its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def measured(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, processor seconds, and the peak of resident memory above what was there before, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    start = time.process_time()
    result = call()
    return result, time.process_time() - start, memory("VmHWM") - before


def memory(field: str) -> float:
    """A field of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def in_its_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that runs in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
