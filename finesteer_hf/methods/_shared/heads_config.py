"""Settings and tensors of methods that steer a few attention heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch

from finesteer_hf.adapters.config import MOST_HEADS, SteeringConfig, setting, written_by_fit
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.methods._shared.checks import check_count, check_layers, check_one_of, check_strength
from finesteer_hf.processors import Positions
from finesteer_hf.sites import Site


DIRECTIONS = ("centre", "probe")
# Most numbers of all heads of all blocks; the largest models have a million.
MOST_NUMBERS = 1 << 26


@dataclass(kw_only=True)
class HeadsConfig(SteeringConfig):
    """Settings of methods that steer a few attention heads.

    Attributes:
        num_heads: number of steered heads, the best on held-out rows; all if the model has fewer. `auto` tries the
            paper's share of the model's heads, half, twice and four times as many, and the paper's number, and takes
            the one with the best held-out effect.
        layers: blocks whose heads are probed; `auto` is all of them.
        direction: `centre` (difference of the class means) or `probe` (the probe's weights).
        heads: the chosen `[layer, head]` pairs, filled in by the fit.
        attention_heads: number of heads of each block, filled in by the fit.
    """

    #: Number of heads that the paper steers, out of `heads.PUBLISHED_HEADS`.
    published_count: ClassVar[int]

    positions: Positions = field(default="generated", metadata=setting("Steered tokens: generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Alpha: a number, auto, kl:<nats> or norm:<share>.")
    )
    num_heads: int | str = field(default="auto", metadata=setting("Number of steered heads, or auto."))
    layers: list[int] | str = field(default="auto", metadata=setting("Probed blocks, or auto for all."))
    direction: Literal["centre", "probe"] = field(default="centre", metadata=setting("centre or probe."))
    heads: list[list[int]] = field(default_factory=list, metadata=written_by_fit("Chosen [layer, head] pairs."))
    attention_heads: int | None = field(
        default=None, metadata=written_by_fit("Heads of each block.", least=1, most=MOST_HEADS)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("positions", self.positions, ("generated",))
        check_one_of("direction", self.direction, DIRECTIONS)
        check_strength(self.strength)
        if self.num_heads != "auto":
            check_count("num_heads", self.num_heads, 1)
        check_layers(self.layers, self.num_hidden_layers)
        for pair in self.heads:
            if len(pair) != 2:
                raise ValueError(f"heads must be [layer, head] pairs, got {pair!r}.")
            check_count("heads' layer", pair[0], 0)
            check_count("heads' head", pair[1], 0)
            if self.attention_heads is not None and pair[1] >= self.attention_heads:
                raise ValueError(f"heads names head {pair[1]} of a model with {self.attention_heads} heads per block.")
            if self.num_hidden_layers is not None and pair[0] >= self.num_hidden_layers:
                raise ValueError(f"heads names block {pair[0]} of a model with {self.num_hidden_layers} layers.")
        if len({tuple(pair) for pair in self.heads}) != len(self.heads):
            raise ValueError("heads names a head twice.")

    @property
    def of_site(self) -> dict[Site, list[int]]:
        """For each site, the rows of the chosen heads' tensors, in forward order."""
        found: dict[Site, list[int]] = {}
        for row, (layer, _) in sorted(enumerate(self.heads), key=lambda item: item[1]):
            found.setdefault(Site("head_out", layer), []).append(row)
        return found


ConfigT = TypeVar("ConfigT", bound=HeadsConfig)


def require_heads(config: HeadsConfig, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
    """Raise `AdapterFileError` if the config names no heads, or a tensor is missing or has other rows."""
    missing = sorted(set(names) - set(tensors))
    if not config.heads or config.attention_heads is None or missing:
        raise AdapterFileError(
            f"A {config.steering_type} adapter needs `heads`, `attention_heads` and the tensors {list(names)} (missing: "
            f"{missing}); fit it with `fit_steering`."
        )
    for name in names:
        if tensors[name].shape[0] != len(config.heads):
            raise AdapterFileError(f"Tensor {name!r} has {tensors[name].shape[0]} rows for {len(config.heads)} heads.")
    blocks, size = len({layer for layer, _ in config.heads}), tensors[names[0]].shape[-1]
    if blocks * config.attention_heads * size > MOST_NUMBERS:
        raise AdapterFileError(
            f"The {config.steering_type} adapter steers {blocks} blocks of {config.attention_heads} heads of size {size}, "
            f"which is more than {MOST_NUMBERS} numbers; no model is that large."
        )


def dense_shift(config: HeadsConfig, rows: Sequence[int], shifts: torch.Tensor) -> torch.Tensor:
    """The shifts of a block's chosen heads as one vector of all its heads.

    Args:
        config: names the heads.
        rows: rows of the block, see `HeadsConfig.of_site`.
        shifts: `[chosen heads, size]`.

    Returns:
        `[attention_heads * size]`, zero at the other heads.
    """
    dense = shifts.new_zeros(int(config.attention_heads or 0), shifts.shape[1])
    for row in rows:
        dense[config.heads[row][1]] = shifts[row]
    return dense.flatten()
