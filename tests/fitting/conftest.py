"""Rows of the dose tests. This file also puts its folder on the import path, for the helpers beside it."""

from __future__ import annotations

import pytest
from fitting_toys import random_rows

from finesteer_hf.fitting.data.encoding import EncodedRow


@pytest.fixture
def rows() -> list[EncodedRow]:
    return random_rows(7)
