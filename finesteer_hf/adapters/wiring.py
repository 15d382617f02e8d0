"""What adapters ask of the layers above them, by name.

An adapter can be pulled, pushed, shown on a card and summed up, and yet this layer imports nothing of that: the names are
looked up when they are first called, as methods are by the registry.
"""

from __future__ import annotations

import importlib
from typing import Any


_HOMES = {
    "resolve_adapter_files": "finesteer_hf.hub.pull",
    "push_adapter": "finesteer_hf.hub.push",
    "with_public_base": "finesteer_hf.hub.push",
    "render_card": "finesteer_hf.hub.card",
    "generate_code": "finesteer_hf.hub.generate_code",
    "combine": "finesteer_hf.adapters.algebra",
}


def above(name: str) -> Any:
    """A function of a layer above, by its name in `_HOMES`."""
    return getattr(importlib.import_module(_HOMES[name]), name)
