"""Small models of several architectures, and rows of random tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finesteer_hf.fitting.data.encoding import EncodedRow, Passage


LLAMA_SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GPT2_SIZES = {"vocab_size": 60, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
SMALL_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA_SIZES, "num_key_value_heads": 2},
    "gpt2": GPT2_SIZES,
    "gpt_neox": LLAMA_SIZES,
    "opt": {
        "vocab_size": 60,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "init_std": 0.3,
    },
    "mistral": {**LLAMA_SIZES, "num_key_value_heads": 2, "sliding_window": 8},
    "gemma2": {**LLAMA_SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "bloom": {"vocab_size": 60, "hidden_size": 32, "n_layer": 4, "n_head": 4, "initializer_range": 0.3},
    "mamba": {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 4},
}


def small_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**SMALL_CONFIGS[kind], **changes})
    config.pad_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def random_rows(count: int, seed: int = 0, vocabulary: int = 60) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())

    rows = []
    for _ in range(count):
        prompt = ids(1, 12)
        chosen, rejected = (ids(1, 7) for _ in range(2))
        answers = [
            # Of some answers the last token ends the turn.
            Passage((*prompt, *chosen), len(prompt), closing=int(len(chosen) > 1)),
            Passage((*prompt, *rejected), len(prompt)),
        ]
        rows.append(EncodedRow(Passage(prompt), *answers))
    return rows
