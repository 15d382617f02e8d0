"""A method for tests only: its vector and its gate depend on the query in the simplest way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.config import SteeringConfig, setting
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import Site


@dataclass(kw_only=True)
class ProbeConfig(SteeringConfig):
    """Config of `Probe`: the site that it reads and the one that it writes."""

    steering_type = "PROBE"
    read: str = field(default="resid_post[0]", metadata=setting("Site whose query state decides."))
    write: str = field(default="resid_post[1]", metadata=setting("Site that is steered."))


class Probe(SteeringMethod[ProbeConfig]):
    """Adds `length * roll(h / |h|)` if the query's state h has a positive cosine with a direction.

    Tensors: `direction` `[width]`, gives the length of the vectors and the direction of the gate.
    """

    def __init__(self, config: ProbeConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        self.reads = (Site.parse(config.read),)
        self.writes = (Site.parse(config.write),)
        self.direction = self.tensors["direction"]
        self.threshold = -1.0

    @classmethod
    def tensor_shapes(cls, config: ProbeConfig) -> dict[str, tuple[int | None, ...]]:
        return {"direction": (config.hidden_size,)}

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Cosine of the states `[rows, width]` with the direction, `[rows]`."""
        return torch.nn.functional.cosine_similarity(states.float(), self.direction[None], dim=-1)

    def vectors_of(self, states: torch.Tensor) -> torch.Tensor:
        """The vectors of queries `[rows, width]`, each as long as the direction."""
        return torch.nn.functional.normalize(states.float(), dim=-1).roll(1, dims=-1) * self.direction.norm()

    def decide(self, queries: QueryStates) -> Decision:
        states = queries[self.reads[0]]
        score = self.score(states)
        return Decision({self.writes[0]: self.vectors_of(states)}, (score > self.threshold).float(), {"score": score})


def probe_adapter(read: Site, write: Site, direction: torch.Tensor) -> SteeringAdapter:
    """An adapter of the probe.

    Args:
        read: site whose query state decides.
        write: site that is steered.
        direction: float `[width]`.
    """
    config = ProbeConfig(hidden_size=int(direction.numel()), read=str(read), write=str(write), strength=1.0)
    return SteeringAdapter(config, {"direction": direction.detach().float()})


register_steering_method(Probe)
