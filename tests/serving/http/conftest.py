"""The tests of the server are left out where the extra `serve`, or what they talk to it with, is not installed.

The root of the repo is put on the import path, for `benchmarks`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[3]))

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "openai", "httpx")
MISSING = [name for name in PACKAGES if find_spec(name) is None]
if MISSING:
    collect_ignore_glob = ["test_*.py"]
else:
    from server_fixtures import alone, playground, toy_folders

    __all__ = ["alone", "playground", "toy_folders"]


def pytest_report_header() -> str | None:
    return f"tests/serving/http is left out: {', '.join(MISSING)} missing" if MISSING else None
