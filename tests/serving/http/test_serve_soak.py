"""Mixed load for a while: each failure stays with its request, and memory does not grow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from server_toys import ADAPTERS

from benchmarks.speed.serve_load import drive, parse_options
from benchmarks.speed.served_process import server_process


@pytest.mark.slow
def test_twenty_seconds_of_mixed_load(tmp_path: Path) -> None:
    seconds = float(os.environ.get("FINESTEER_SOAK_SECONDS", "20"))
    options = parse_options(["--minutes", str(seconds / 60), "--clients", "8", "--page", ""])
    with server_process("playground", ADAPTERS, tmp_path / "log") as server:
        result = drive(server, options)
    assert result.wrong == [] and result.unexpected == []
    assert result.answers > 20 and all(result.errors[kind] > 0 for kind in ("hung up", "400", "404"))
    # Allocators keep some of what a burst took; a leak of one request's state would show as more.
    assert result.memory_end < 1.1 * result.memory_start + 2**25
