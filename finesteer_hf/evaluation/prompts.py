"""Token ids of prompts and answers, as `generate` would see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from finesteer_hf.fitting.templating import format_query, render_prompt, text_tokenizer, tokenise


Prompt: TypeAlias = str | list[dict[str, Any]]


def as_chat(text: str, system: str | None = None) -> list[dict[str, Any]]:
    """A chat of one user message, after a system message if there is one."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": text}]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt: a text as it is, a chat after its template with the generation prompt."""
    return format_query(tokenizer, prompt)


def encode_answer(tokenizer: Any, prompt: Prompt, answer: str, prompt_ids: Sequence[int]) -> list[int]:
    """Ids of the answer's text after a prompt, without the tokens that end a turn.

    Where tokenising both together would change the prompt's own ids, the answer is tokenised alone: the query that the
    gate reads must be the one that `generate` reads.
    """
    tokenizer = text_tokenizer(tokenizer)
    text = render_prompt(tokenizer, prompt) + answer
    ids = tokenise(tokenizer, [text], special_tokens=isinstance(prompt, str))[0]
    if ids[: len(prompt_ids)] == list(prompt_ids):
        return ids[len(prompt_ids) :]
    return tokenise(tokenizer, [answer], special_tokens=False)[0]
