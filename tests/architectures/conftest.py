"""Skip classes that the installed transformers does not have."""

from __future__ import annotations

import pytest
import transformers


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests parametrised by a missing class."""
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("name", callspec.params.get("subject")) if callspec else None
    if name is not None and not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
