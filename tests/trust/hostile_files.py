"""Files made by hand, sound or not."""

from __future__ import annotations

import json
import struct
from typing import Any


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body
