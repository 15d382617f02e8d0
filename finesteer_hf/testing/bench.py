"""A steered toy model with prompts, and the plainest way to generate with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


NEW_TOKENS = 8


@dataclass
class Bench:
    """What the checks work on.

    Attributes:
        model: steered, with an adapter named `a` that is active.
        prompts: token ids of prompts of different lengths, `[tokens]` each.
        scale: a run-time scale at which steering changes the text of at least one prompt.
        expected: what each prompt alone gives at that scale, steered: new tokens only.
        unsteered: the same without steering.
    """

    model: Any
    prompts: list[torch.Tensor]
    scale: float
    expected: list[list[int]]
    unsteered: list[list[int]]

    @classmethod
    def of(cls, model: Any, vocabulary: int | None = None, seed: int = 3) -> Bench:
        """Find prompts and a scale at which steering shows.

        Raises:
            AssertionError: if no scale up to 64 changes any text: then no check could fail.
        """
        generator = torch.Generator().manual_seed(seed)
        size = vocabulary or model.config.get_text_config().vocab_size
        prompts = [torch.randint(6, size, (n,), generator=generator).to(model.device) for n in (7, 4, 9, 6)]
        bench = cls(model, prompts, 1.0, [], [])
        bench.unsteered = [bench.alone(i, steering=None) for i in range(len(prompts))]
        while bench.scale <= 64:
            bench.expected = [bench.alone(i) for i in range(len(prompts))]
            if sum(a != b for a, b in zip(bench.expected, bench.unsteered, strict=True)) >= 2:
                return bench
            bench.scale *= 2
        raise AssertionError("steering changes the text of fewer than two of four prompts, even at scale 64")

    def alone(self, index: int, **kwargs: Any) -> list[int]:
        """New tokens of one prompt by itself."""
        return self.generate([index], **kwargs)[0]

    def batch(self, indices: list[int], side: str = "left") -> dict[str, torch.Tensor]:
        """Prompts as a padded batch."""
        rows = [self.prompts[i] for i in indices]
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
            ids[number, where], mask[number, where] = row, 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def generate(self, indices: list[int], **kwargs: Any) -> list[list[int]]:
        """New tokens of a batch, greedy unless `kwargs` say otherwise."""
        inputs = kwargs.pop("inputs", None) or self.batch(indices)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "steering_scale": self.scale, **kwargs}
        if settings.get("steering", "") is None:
            settings.pop("steering_scale")
        out = self.model.generate(**inputs, **settings)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return [row[width:].tolist() for row in sequences]
