"""What a request asks for, and under which salt its states are cached.

Steering rides in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`): `steering`, the name of an adapter, and
`steering_scale`, a number, 1 by default.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


NAME, SCALE = "steering", "steering_scale"
# Written by the front end once it has checked a request: the salt of the adapter that it found under the name.
ADMITTED = "steering_admitted"


class SteeringRequestError(ValueError):
    """A request for steering that cannot be honoured; vLLM answers it with status 400."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for: an adapter by name, and the scale, not 0."""

    adapter: str
    scale: float


def asked_of(extra_args: Mapping[str, Any] | None, served: Sequence[str]) -> Asked | None:
    """Read a request's steering.

    Args:
        extra_args: of its `SamplingParams`.
        served: names of the adapters that the server has.

    Returns:
        None for a request that is not steered: it asks for nothing, or for scale 0.

    Raises:
        SteeringRequestError: for an adapter that the server does not have, a scale that is no finite number, several
            adapters, and arguments that begin with `steering` and are not known.
    """
    own = {key: value for key, value in (extra_args or {}).items() if key.startswith(NAME)}
    unknown = sorted(set(own) - {NAME, SCALE})
    # A server without adapters may have another plugin, whose arguments begin likewise.
    if unknown and served:
        raise SteeringRequestError(f"Unknown arguments {unknown}; a request may have {NAME!r} and {SCALE!r}.")
    name, scale = own.get(NAME), own.get(SCALE, 1.0)
    if name is None:
        if SCALE in own and served:
            raise SteeringRequestError(
                f"{SCALE}={scale!r} without {NAME!r}: name the adapter. Served: {list(served)}."
            )
        return None
    if not isinstance(name, str):
        raise SteeringRequestError(
            f"{NAME}={name!r} must be the name of one adapter; a request is steered by one. Served: {list(served)}."
        )
    if name not in served:
        raise SteeringRequestError(f"There is no steering adapter {name!r} on this server. Served: {list(served)}.")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise SteeringRequestError(f"{SCALE}={scale!r} must be a finite number.")
    return Asked(name, float(scale)) if scale else None


def cache_salt(asked: Asked, adapter_salt: str, prompt: Sequence[int], given: str | None) -> str:
    """The salt under which vLLM may share a steered request's cached states with others.

    From the prompt's last token on the states hold what was added, and that hinges on the whole prompt. The next turn of a
    conversation has the same text with a later query, and its tokens before that are to be unsteered; so it must find
    nothing of this one's, under the same adapter either. Requests with the same prompt, adapter and scale share rightly:
    the last token of a prompt is always computed, and before it nothing is steered.

    Args:
        asked: adapter and scale.
        adapter_salt: of the adapter's files.
        prompt: token ids.
        given: a salt that the request brought itself.
    """
    text = json.dumps([given, adapter_salt, asked.scale, list(prompt)])
    return f"finesteer-{hashlib.sha256(text.encode()).hexdigest()}"
