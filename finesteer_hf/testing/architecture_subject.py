"""A tiny model of an architecture under test, and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from finesteer_hf.processors import ConstantVector
from finesteer_hf.sites import Site, SiteKind
from finesteer_hf.testing.reference import reading


NEW_TOKENS = 3
LAYER = 1
# Relative tolerance of logits, for results that sum in another order (a row alone, a cache).
TOLERANCE = 1e-3


@dataclass
class Answer:
    """The output of a call: `sequences` `[rows, columns]`, `logits` `[steps, rows, vocabulary]`."""

    sequences: torch.Tensor
    logits: torch.Tensor

    def row(self, index: int) -> Answer:
        """One row, as if generated alone."""
        return Answer(self.sequences[index : index + 1], self.logits[:, index : index + 1])


def same_bits(a: Answer, b: Answer) -> bool:
    """Whether two answers are bit-identical."""
    return torch.equal(a.sequences, b.sequences) and torch.equal(a.logits, b.logits)


def agree(a: Answer, b: Answer) -> bool:
    """Whether two answers have the same new tokens, with logits equal up to rounding."""
    if not torch.equal(a.sequences[:, -NEW_TOKENS:], b.sequences[:, -NEW_TOKENS:]):
        return False
    finite = a.logits[a.logits.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(a.logits, b.logits, rtol=0, atol=TOLERANCE * size)


class Subject:
    """A tiny model under test, and its unsteered answers.

    Args:
        model: steered (`SteeredModelForCausalLM.from_model`), with nothing loaded.
        vocabulary: prompts are drawn from the ids below it.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.model = model
        self.blocks: nn.ModuleList = model._steering.tower.layers
        generator = torch.Generator().manual_seed(11)
        self.ids = torch.randint(3, vocabulary, (3, 6), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :2] = 0
        self.mask[2, :3] = 0
        self.padded_ids = self.ids * self.mask
        width = model._steering.tower.hidden_size
        self.direction = torch.randn(width, generator=generator)

    def say(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> Answer:
        """Generate, greedily by default."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True}
        out = self.model.generate(**inputs, return_dict_in_generate=True, **{**settings, **kwargs})
        return Answer(out.sequences, torch.stack(out.logits))

    def alone(self, index: int, **kwargs: Any) -> Answer:
        """One row of the padded batch without its pads."""
        return self.say(self.padded_ids[index : index + 1, self.mask[index].bool()], **kwargs)

    @cached_property
    def base(self) -> Answer:
        """The batch without pads, unsteered."""
        return self.say(self.ids)

    @cached_property
    def states(self) -> torch.Tensor:
        """Unsteered states of the three queries after block `LAYER`, `[3, width]`."""
        with reading(self.blocks[LAYER]) as seen:
            self.say(self.ids, max_new_tokens=1)
        return seen[0][:, -1]

    @cached_property
    def vector(self) -> torch.Tensor:
        """A vector with the norm of the states that it is added to, `[width]`."""
        return self.direction / self.direction.norm() * self.states.norm(dim=-1).mean()

    @cached_property
    def pads_change_the_base(self) -> bool:
        """Whether rows of a left-padded batch differ from the rows alone, unsteered."""
        batch = self.say(self.padded_ids, self.mask)
        return not all(agree(batch.row(i), self.alone(i)) for i in range(3))

    @cached_property
    def batches_change_the_base(self) -> bool:
        """Whether rows of a batch without pads differ from the rows alone, unsteered."""
        return not all(agree(self.base.row(i), self.say(self.ids[i : i + 1])) for i in range(3))

    def site(self, kind: SiteKind) -> Site:
        """The site of block `LAYER`."""
        return Site(kind, LAYER)

    def constant(self, kind: SiteKind = "resid_post", vector: torch.Tensor | None = None) -> dict[str, Any]:
        """Arguments of `generate` that add a vector at a site of block `LAYER`."""
        return {"steering_processor": [ConstantVector(self.site(kind), self.vector if vector is None else vector)]}
