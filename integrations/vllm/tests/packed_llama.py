"""A transformers Llama as vLLM runs one: tokens of many requests in one row, blocks that return (hidden, residual).

The weights and the small modules are those of the given model; only the arrangement is vLLM's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


@dataclass
class Segment:
    """A request's tokens in the batch, and its keys and values by block, `[heads, tokens, width]`."""

    start: int
    tokens: int
    computed: int
    cache: dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class ForwardContext:
    """What attention is told of the batch, beside its tokens."""

    segments: list[Segment] = field(default_factory=list)


CONTEXT = ForwardContext()


class LlamaDecoderLayer(nn.Module):
    """A block with vLLM's signature and return value."""

    def __init__(self, block: nn.Module, rotary: nn.Module, number: int) -> None:
        super().__init__()
        self.block, self.rotary, self.number = block, rotary, number

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        residual = residual + self._attention(positions, self.block.input_layernorm(residual))
        return self.block.mlp(self.block.post_attention_layernorm(residual)), residual

    def _attention(self, positions: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        attention = self.block.self_attn
        size = attention.head_dim
        query, key, value = (
            project(states).unflatten(-1, (-1, size)).transpose(0, 1)[None]
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *self.rotary(states[None], positions[None]))
        # Padding attends to nothing, and nothing to it.
        mixed = torch.zeros(query.shape[1:])
        for part in CONTEXT.segments:
            own = slice(part.start, part.start + part.tokens)
            keys, values = key[0, :, own], value[0, :, own]
            if part.computed:
                before = part.cache[self.number]
                keys, values = (torch.cat([old, new], dim=1) for old, new in zip(before, (keys, values), strict=True))
            part.cache[self.number] = keys, values
            groups = query.shape[1] // keys.shape[0]
            scores = query[0, :, own] @ keys.repeat_interleave(groups, 0).transpose(1, 2) / math.sqrt(size)
            later = torch.arange(keys.shape[1])[None] > torch.arange(part.computed, keys.shape[1])[:, None]
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            mixed[:, own] = weights @ values.repeat_interleave(groups, 0)
        return attention.o_proj(mixed.transpose(0, 1).flatten(1))


class LlamaModel(nn.Module):
    """The decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.embed_tokens, self.norm = decoder.embed_tokens, decoder.norm
        blocks = [LlamaDecoderLayer(block, decoder.rotary_emb, n) for n, block in enumerate(decoder.layers)]
        self.layers = nn.ModuleList(blocks)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.embed_tokens(input_ids), None
        for block in self.layers:
            hidden, residual = block(positions, hidden, residual)
        return self.norm(hidden + residual)


class LlamaForCausalLM(nn.Module):
    """The model, of one that transformers loaded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.lm_head = LlamaModel(model.model), model.lm_head

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, positions)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)
