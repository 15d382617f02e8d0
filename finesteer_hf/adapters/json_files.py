"""Untrusted JSON: bounded in size, without repeated keys, and strictly JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finesteer_hf.errors import AdapterFileError


# An empty list takes thirty times the memory of its two characters.
MOST_BRACKETS = 200_000


def read_json_object(path: str | Path, most_bytes: int) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        most_bytes: largest size that is read.

    Raises:
        AdapterFileError: if it is too large, nested too deeply, not a JSON object, repeats a key, or holds a number or
            string that JSON does not allow.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > most_bytes:
        raise AdapterFileError(f"{path.name} has {size} bytes; at most {most_bytes} are read.")
    try:
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MOST_BRACKETS:
            raise ValueError(f"it has more than {MOST_BRACKETS} lists and objects")
        data = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_finite, parse_float=_finite)
        # JSON can escape half of a surrogate pair, but Python cannot write or print it.
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path.name} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise AdapterFileError(f"{path.name} must hold a JSON object, not a {type(data).__name__}.")
    return data


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, for `object_pairs_hook`; raises `ValueError` if a key is repeated."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError(f"a key is repeated among {sorted(made)[:20]}")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a JSON number")
    return value
