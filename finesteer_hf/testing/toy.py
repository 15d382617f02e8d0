"""A model, a tokenizer and data, small enough to fit any method quickly.

The model has random weights, large enough that steering changes its answers; the tokenizer has one id per word.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


_WORDS = [f"{kind}{number}" for kind in ("sun", "sea", "oak", "fox") for number in range(12)]
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<user>", "<assistant>"]
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with pad, eos and a chat template."""
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=_TEMPLATE,
        padding_side="left",
    )


def toy_model(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of three layers, width 32, with grouped-query attention; it never ends a text on its own."""
    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(_WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        # At the default scale of 0.02 a random model says one word whatever the prompt.
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def toy_preferences(rows: int = 48, seed: int = 0) -> list[dict[str, str]]:
    """Preference rows: chosen answers have words of one kind, rejected ones of another."""
    generator = torch.Generator().manual_seed(seed)

    def words(kind: str, count: int) -> str:
        return " ".join(f"{kind}{i}" for i in torch.randint(12, (count,), generator=generator).tolist())

    result = []
    for row in range(rows):
        kind = "sun" if row % 2 else "sea"
        prompt = f"<bos> <user> {words(kind, 3 + row % 4)} sun{row % 12} sea{row // 12 % 12} <assistant>"
        chosen = f" {words('oak', 2 + row % 3)}"
        rejected = f" {words('fox', 2 + row % 3)}"
        result.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "category": kind})
    return result


def toy_general_prompts(rows: int = 24, seed: int = 1) -> list[dict[str, str]]:
    """Prompts unlike those of `toy_preferences`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "prompt": "<bos> "
            + " ".join(f"fox{i}" for i in torch.randint(12, (3 + row % 5,), generator=generator).tolist())
        }
        for row in range(rows)
    ]
