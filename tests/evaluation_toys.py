"""A word-level tokenizer with a chat template, a tiny Llama with random weights, and a small gated method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finesteer_hf import Decision, QueryStates, Site, SteeringAdapter
from finesteer_hf.adapters import config, registry
from finesteer_hf.method_api import SteeringMethod


WORDS = (
    "what is the sky made of ? it air water stone fire blue green red . tell me about cats and dogs they are many "
    "small large one two three four five six seven eight nine ten yes no sorry , here how to sing a song"
).split()
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>", padding_side="left"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_llama(vocabulary: int, layers: int = 3) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    # Random weights of the default scale give almost uniform outputs; larger ones make prompts matter.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    return tiny_llama(len(tokenizer))


SITE = Site("resid_post", 1)


@dataclass(kw_only=True)
class HalfPlaneConfig(config.SteeringConfig):
    """Steer where the query lies on one side of a plane."""

    steering_type: ClassVar[str] = "TEST_HALF_PLANE"
    layer: int = 1


class HalfPlane(SteeringMethod):
    config_cls = HalfPlaneConfig
    reads = writes = (SITE,)

    @classmethod
    def tensor_shapes(cls, config: config.SteeringConfig) -> dict[str, tuple[int | None, ...]]:
        return {"normal": (None,), "vector": (None,)}

    def decide(self, queries: QueryStates) -> Decision:
        score = queries[SITE] @ self.tensors["normal"]
        return Decision({SITE: self.tensors["vector"][None]}, (score > 0).float(), {"score": score})


def half_plane_adapter(normal: torch.Tensor, strength: float = 2.0, **fields: Any) -> SteeringAdapter:
    torch.manual_seed(1)
    vector = 4 * torch.randn(normal.shape[0])
    return SteeringAdapter(HalfPlaneConfig(strength=strength, **fields), {"normal": normal, "vector": vector})


@pytest.fixture
def half_plane() -> Iterator[None]:
    registry.register_steering_method("TEST_HALF_PLANE", config_cls=HalfPlaneConfig, method_cls=HalfPlane)
    yield
    del registry._REGISTRY["TEST_HALF_PLANE"]
