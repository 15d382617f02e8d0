"""Token ids of prompts and answers, as `generate` sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from finesteer_hf.fitting.data.templating import format_query, render_prompt, text_tokenizer, tokenise


Prompt: TypeAlias = str | list[dict[str, Any]]


def as_chat(text: str, system: str | None = None) -> list[dict[str, Any]]:
    """A chat of one user message, after a system message if given."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": text}]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt: a text as it is, a chat through its template with the generation prompt."""
    return format_query(tokenizer, prompt)


def encode_pairs(
    tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prompts and of their answers' texts, without the tokens that end a turn.

    If tokenising both together would change the prompt's ids, the answer is tokenised alone: the gate must read the
    same query as in `generate`.

    Returns:
        The prompts' ids and the answers' ids.
    """
    tokenizer = text_tokenizer(tokenizer)
    # A prompt with many answers is the same object each time; cached, because rendering a template is slow.
    rendered = {id(prompt): render_prompt(tokenizer, prompt) for prompt in prompts}
    prompt_ids: list[list[int]] = [[]] * len(prompts)
    answer_ids: list[list[int]] = [[]] * len(prompts)
    for plain in (True, False):
        mine = [row for row, prompt in enumerate(prompts) if isinstance(prompt, str) is plain]
        texts = [rendered[id(prompts[row])] for row in mine]
        together = [text + answers[row] for text, row in zip(texts, mine, strict=True)]
        alone = tokenise(tokenizer, texts, special_tokens=plain)
        both = tokenise(tokenizer, together, special_tokens=plain)
        for row, ids, joined in zip(mine, alone, both, strict=True):
            prompt_ids[row] = ids
            if joined[: len(ids)] == ids:
                answer_ids[row] = joined[len(ids) :]
            else:
                answer_ids[row] = tokenise(tokenizer, [answers[row]], special_tokens=False)[0]
    return prompt_ids, answer_ids
