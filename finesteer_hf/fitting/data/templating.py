"""From a prompt to token ids: the only code that templates a query.

A query's state is read at its last token, after the chat template with the generation prompt. So fitting and steering
must render it with the same code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data.rows import Message, Text


# An encoding has much more than the ids: encodings of 20,000 rows take 100 MB.
TOKENISED_AT_ONCE = 1024


def text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer inside a processor of a vision-language model, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def chat_template_hash(tokenizer: Any) -> str | None:
    """sha256 of the tokenizer's chat template; None if it has none."""
    template = getattr(text_tokenizer(tokenizer), "chat_template", None)
    if template is None:
        return None
    text = template if isinstance(template, str) else repr(sorted(dict(template).items()))
    return hashlib.sha256(text.encode()).hexdigest()


def format_query(tokenizer: Any, prompt: Text, system: str | None = None) -> list[int]:
    """Token ids of a query, the same for fitting and steering.

    Messages go through the chat template with the generation prompt and get no second beginning-of-text token. Text is
    tokenised as it is, with the tokenizer's special tokens; with `system` it becomes a user message.

    Args:
        tokenizer: a transformers tokenizer (or a processor that has one).
        prompt: text, or messages up to the query.
        system: text of a system message to put first.

    Returns:
        Ids of one unpadded sequence, for the model as `[1, tokens]`.

    Raises:
        DatasetError: if messages are given but the tokenizer has no chat template, or its template refuses them.

    Example:
        >>> ids = format_query(tokenizer, [{"role": "user", "content": "Do vaccines cause autism?"}])
        >>> model.generate(torch.tensor([ids]), max_new_tokens=32)
    """
    tokenizer = text_tokenizer(tokenizer)
    if system is not None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [{"role": "system", "content": system}, *messages]
    return tokenise(tokenizer, [render_prompt(tokenizer, prompt)], special_tokens=isinstance(prompt, str))[0]


def render_prompt(tokenizer: Any, prompt: Text) -> str:
    """The text of a query: as it is, or rendered by the chat template with the generation prompt.

    Raises:
        DatasetError: as for `format_query`.
    """
    if isinstance(prompt, str):
        return prompt
    return render(tokenizer, prompt, add_generation_prompt=True)


def tokenise(tokenizer: Any, texts: Sequence[str], *, special_tokens: bool) -> list[list[int]]:
    """Token ids of texts, never truncated; `special_tokens` is False for text that a chat template rendered."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), TOKENISED_AT_ONCE):
        some = list(texts[start : start + TOKENISED_AT_ONCE])
        encoded = tokenizer(some, add_special_tokens=special_tokens, truncation=False, verbose=False)
        ids += [list(own) for own in encoded["input_ids"]]
    return ids


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    import jinja2

    if getattr(tokenizer, "chat_template", None) is None:
        raise DatasetError(
            f"the row has chat messages, but the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat "
            "template. Set `tokenizer.chat_template`, or give prompts and answers as text."
        )
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except jinja2.TemplateError as error:
        raise DatasetError(
            f"the chat template refuses the messages with the roles {[m['role'] for m in messages]}: {error}. If it "
            "has no system role, put the system text before the first user message."
        ) from error


# -- data sets --------------------------------------------------------------------------------------------------------
