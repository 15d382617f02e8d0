"""Classes that are younger than the installed transformers are left out."""

from __future__ import annotations

import pytest
import transformers


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is parametrised by a class that is not there."""
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("name", callspec.params.get("subject")) if callspec else None
    if name is not None and not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
