"""What `model.steering_status()` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finesteer_hf.runtime.decoding.compiled import forward_is_compiled


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime


@dataclass(frozen=True)
class AdapterStatus:
    """One loaded adapter.

    Attributes:
        name: its name on this model.
        steering_type: its method.
        source: Hub id or folder that it came from, if any.
        revision: commit that it came from, if it came from the Hub.
        reads, writes, maps: its sites.
        positions: tokens that it steers.
        strength: its lambda.
        scale: its scale if it is active, else None.
        devices: devices that have a copy of its tensors; copies are made on first use.
    """

    name: str
    steering_type: str
    source: str | None
    revision: str | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    maps: tuple[str, ...]
    positions: str
    strength: float
    scale: float | None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class SteeringStatus:
    """Summary of a steered model.

    Attributes:
        adapters: the loaded adapters.
        active: names and scales of the active adapters, in the order in which they act.
        hooks: the sites that have a hook.
        compiled: whether the model was compiled in place, so that plain forwards steer inside the graph.
    """

    adapters: tuple[AdapterStatus, ...]
    active: dict[str, float]
    hooks: tuple[str, ...]
    compiled: bool = False

    def __str__(self) -> str:
        lines = [f"active: {self.active or 'nothing'}; hooks at {', '.join(self.hooks) or 'no site'}"]
        lines[0] += "; compiled" if self.compiled else ""
        for a in self.adapters:
            origin = f" from {a.source}" + (f" (commit {a.revision[:12]})" if a.revision else "") if a.source else ""
            lines.append(
                f"  {a.name}: {a.steering_type}{origin}, reads {list(a.reads)}, writes {list(a.writes + a.maps)}, "
                f"positions={a.positions}, strength={a.strength:g}, scale={a.scale}"
                + (f", copied to {', '.join(a.devices)}" if a.devices else "")
            )
        return "\n".join(lines)


def steering_status(runtime: SteeringRuntime) -> SteeringStatus:
    """Summarise a model's run time."""
    active = dict(runtime.active()[0])
    adapters = []
    for name, loaded in runtime.adapters.items():
        processor = loaded.processor
        adapters.append(
            AdapterStatus(
                name=name,
                steering_type=loaded.adapter.config.steering_type,
                source=loaded.adapter.source,
                revision=loaded.adapter.revision,
                reads=tuple(map(str, processor.reads)),
                writes=tuple(map(str, processor.writes)),
                maps=tuple(map(str, processor.maps)),
                positions=processor.positions,
                strength=processor.strength,
                scale=active.get(name),
                devices=tuple(sorted(map(str, processor.devices))),
            )
        )
    hooks = tuple(str(site) for site in sorted(runtime.site_hooks))
    return SteeringStatus(tuple(adapters), active, hooks, forward_is_compiled(runtime.model))
