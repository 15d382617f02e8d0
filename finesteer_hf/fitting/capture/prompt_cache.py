"""Prompts run once, unsteered, and reused for all their answers.

If only the answer and the prompt's last token are steered, the keys and values of the tokens before it are the base
model's. They are cached, so that trying a vector costs only the answers, not their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from finesteer_hf.fitting.capture.jobs import batches
from finesteer_hf.fitting.capture.packing import UNBOUNDED, shareable_length
from finesteer_hf.fitting.capture.reader import input_device
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.sites import TextTower


Ids = tuple[int, ...]
Layers = list[tuple[torch.Tensor, torch.Tensor]]
# Prompt tokens of a forward: on a CPU more gains nothing.
PROMPT_TOKENS = 1024
# Most bytes of cached keys and values; prompts beyond them are run each time.
MOST_BYTES = 1 << 29


class PromptCache:
    """Keys and values of prompts, without their last token.

    Args:
        model: a causal LM; its active adapters are ignored.
        most_bytes: most bytes of cached keys and values.

    Attributes:
        usable: whether the architecture allows this; if not, whole texts are run.
        prompts: number of prompts run.
    """

    def __init__(self, model: Any, most_bytes: int = MOST_BYTES) -> None:
        self.model = model
        self.most_bytes = most_bytes
        self.tower = TextTower(model)
        self.device = input_device(model)
        window = shareable_length(model, self.tower)
        # A sliding window's cache drops what a longer text no longer sees.
        self.usable = window == UNBOUNDED
        self.prompts = 0
        self._kept: dict[Ids, Layers] = {}
        self._bytes = 0

    def serves(self, batch: Sequence[Passage], processors: Sequence[SteeringProcessor]) -> bool:
        """Whether a batch can use cached prompts: no processor may steer or look back before the query, act on logits
        or read the prompt mean, which need the whole text.
        """
        late = all(
            p.positions == "generated" and not p.lookback and not p.acts_on_logits and p.query_pool == "last"
            for p in processors
        )
        return self.usable and late and all((passage.answer_start or 0) > 1 for passage in batch)

    @torch.no_grad()
    def continue_from(self, batch: Sequence[Passage]) -> tuple[DynamicCache, torch.Tensor]:
        """The cache that the last prompt token and the answers of a batch continue.

        Args:
            batch: passages with a prompt of at least two tokens, in any order.

        Returns:
            The cache, its rows padded on the left, and its mask, int64 `[rows, columns]`.
        """
        prompts = [passage.ids[: int(passage.answer_start or 0) - 1] for passage in batch]
        found = self._run([prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]) | self._kept
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        cache = DynamicCache()
        for layer in range(len(found[prompts[0]])):
            keys, values = (
                torch.stack([_pad_left(found[prompt][layer][part], width) for prompt in prompts]) for part in (0, 1)
            )
            cache.update(keys, values, layer)
        return cache, mask

    def _run(self, prompts: list[Ids]) -> dict[Ids, Layers]:
        """Run prompts, and keep them while there is room; an evicted one would be the next that is needed."""
        found: dict[Ids, Layers] = {}
        ordered = sorted(prompts, key=len, reverse=True)
        for batch in batches(ordered, lambda own: len(own) * max(map(len, own)), PROMPT_TOKENS):
            width = max(map(len, batch))
            ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in batch], device=self.device)
            mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in batch], device=self.device)
            with self.model.disable_steering():
                cache = self.tower.decoder(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
            for row, prompt in enumerate(batch):
                # Copied, so that the batch's tensors can be freed.
                found[prompt] = [
                    (layer.keys[row, :, : len(prompt)].clone(), layer.values[row, :, : len(prompt)].clone())
                    for layer in cache.layers
                ]
                size = _size(found[prompt])
                if self._bytes + size <= self.most_bytes:
                    self._kept[prompt] = found[prompt]
                    self._bytes += size
            self.prompts += len(batch)
        return found


def _pad_left(states: torch.Tensor, width: int) -> torch.Tensor:
    """`[heads, tokens, size]` left-padded with zeros, so that all rows end together."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[1], 0))


def _size(layers: Layers) -> int:
    return sum(tensor.numel() * tensor.element_size() for pair in layers for tensor in pair)
