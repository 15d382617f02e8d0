"""The packaged general prompts: everyday requests that a gate should leave alone."""

from __future__ import annotations

import functools
import json
from importlib import resources


@functools.cache
def _load() -> tuple[str, ...]:
    text = resources.files("finesteer_hf.fitting.data").joinpath("general_prompts.json").read_text(encoding="utf-8")
    return tuple(json.loads(text))


def default_general_prompts() -> list[str]:
    """Over 200 prompts of many kinds and lengths, in English, written for this package."""
    return list(_load())
