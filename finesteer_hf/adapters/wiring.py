"""Functions of higher layers that adapters call, by name.

An adapter can be pulled, pushed, shown on a card and summed, but this layer imports none of that code. The names are
looked up at the first call, as the registry does with methods.
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
    """A function of a higher layer, by its name in `_HOMES`."""
    return getattr(importlib.import_module(_HOMES[name]), name)
