"""Tiny models, an adapter whose vector depends on the query, and the plain hook that it must agree with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.adapters.registry import register_steering_method
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.processors import Decision, QueryStates
from finesteer_hf.sites import Site


VOCAB, WIDTH, LAYERS, HEADS = 96, 32, 4, 4


def tiny_llama(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention, wide enough weights that steering changes tokens."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2: `Conv1D` projections, tied embeddings, other module names."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def some_prompts(rows: int = 2, tokens: int = 7, seed: int = 1) -> torch.Tensor:
    """Random token ids `[rows, tokens]` without pads and special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, tokens), generator=generator)


@dataclass(kw_only=True)
class QueryShiftConfig(SteeringConfig):
    """Add `strength * tanh(q W)` at `write`, where q is the query's state at `read`; if gated, only where q[0] > 0."""

    steering_type = "TEST_QUERY_SHIFT"
    read: str = field(default="resid_post[1]")
    write: str = field(default="resid_post[1]")
    gated: bool = False


class QueryShift(SteeringMethod):
    """The smallest method whose vector depends on the query."""

    config_cls = QueryShiftConfig

    def __init__(self, config: QueryShiftConfig, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(config, tensors)
        self.reads = (Site.parse(config.read),)
        self.writes = (Site.parse(config.write),)
        self.positions = config.positions
        self.strength = float(config.strength)

    @classmethod
    def tensor_shapes(cls, config: QueryShiftConfig) -> dict[str, tuple[int | None, ...]]:
        width = config.hidden_size or WIDTH
        return {"map": (width, width)}

    def decide(self, queries: QueryStates) -> Decision:
        query = queries[self.reads[0]]
        vector = torch.tanh(query @ self.parameters_on(queries.device)["map"])
        gate = (query[:, 0] > 0).float() if self.config.gated else None
        return Decision({self.writes[0]: vector}, gate)


register_steering_method("TEST_QUERY_SHIFT", config_cls=QueryShiftConfig, method_cls=QueryShift)


def query_shift(
    write: str = "resid_post[1]", read: str | None = None, *, seed: int = 0, strength: float = 3.0, **config: Any
) -> SteeringAdapter:
    """An adapter with a random map; `hidden_size` is that of a model which is wider than the others."""
    generator = torch.Generator().manual_seed(seed)
    settings = QueryShiftConfig(read=read or write, write=write, strength=strength, **config)
    width = settings.hidden_size or WIDTH
    return SteeringAdapter(settings, {"map": torch.randn(width, width, generator=generator) / 4})


def site_module(model: nn.Module, site: str) -> nn.Module:
    """The module of a site in a tiny model, found by name; LoRA wrappers included."""
    from peft import PeftMixedModel, PeftModel

    base = model.base_model.model if isinstance(model, (PeftMixedModel, PeftModel)) else model
    parsed = Site.parse(site)
    block = (base.model.layers if hasattr(base, "model") else base.transformer.h)[parsed.layer]
    if parsed.kind != "head_out":
        return block
    return block.self_attn.o_proj if hasattr(block, "self_attn") else block.attn.c_proj


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def _replaced(value: Any, hidden: torch.Tensor) -> Any:
    return (hidden, *value[1:]) if isinstance(value, tuple) else hidden


@contextlib.contextmanager
def plain_hook(model: nn.Module, site: str, edit: Any) -> Iterator[None]:
    """Replace the stream at a site by `edit(stream)` with an ordinary hook."""
    module = site_module(model, site)
    if site.startswith("resid_post"):
        handle = module.register_forward_hook(lambda m, args, out: _replaced(out, edit(_first(out))), prepend=True)
    else:
        handle = module.register_forward_pre_hook(lambda m, args: _replaced(args, edit(_first(args))))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def query_states(model: nn.Module, ids: torch.Tensor, site: str, query: torch.Tensor | None = None) -> torch.Tensor:
    """Unsteered states of the query tokens, by an ordinary hook on a whole forward."""
    seen: list[torch.Tensor] = []

    def look(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.detach())
        return hidden

    with plain_hook(model, site, look):
        model(input_ids=ids)
    columns = torch.full((ids.shape[0],), ids.shape[1] - 1) if query is None else query
    return seen[0][torch.arange(ids.shape[0]), columns].float()


@contextlib.contextmanager
def reference(
    model: nn.Module, adapter: SteeringAdapter, ids: torch.Tensor, query: torch.Tensor | None = None
) -> Iterator[None]:
    """Steer an unsteered model with ordinary hooks: two passes, the vector cast to the stream's dtype, every token.

    Args:
        model: must not steer by itself here.
        adapter: of `query_shift`.
        ids: the prompts, `[rows, tokens]`, no pads.
        query: column of each row's query; None: the last.
    """
    config = adapter.config
    states = query_states(model, ids, config.read, query)
    with torch.autocast("cpu", enabled=False):
        delta = config.strength * torch.tanh(states @ adapter.tensors["map"])
    with plain_hook(model, config.write, lambda hidden: hidden + delta.to(hidden.dtype)[:, None]):
        yield


def greedy(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Eight greedy tokens."""
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**settings, **kwargs})


def hooks_of(model: nn.Module) -> dict[str, int]:
    """Number of forward hooks of each module that has any."""
    counts = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    return {name: count for name, count in counts.items() if count}


def steer_tiny(model: PreTrainedModel, *adapters: SteeringAdapter) -> Any:
    """Steer a model with adapters named `a`, `b`, ..."""
    from finesteer_hf.model.auto import SteeredModelForCausalLM

    names = "abcdefgh"
    return SteeredModelForCausalLM.from_model(model, steering=dict(zip(names, adapters, strict=False)))


def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits
