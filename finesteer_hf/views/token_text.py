"""The texts of single tokens: as parts of the whole text, and made visible."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from finesteer_hf.fitting.data.templating import text_tokenizer


# Tokens of context that a token is decoded with: some tokenizers drop a leading space at the start of a text.
_CONTEXT = 4
_UNFINISHED = "\ufffd"
# Unicode's control, format, surrogate, private and unassigned characters: a terminal may obey them, and no one sees them.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, such that all of them joined are the decoded text.

    Args:
        tokenizer: a transformers tokenizer.
        ids: `[tokens]`.
    """
    tokenizer = text_tokenizer(tokenizer)

    def decoded(start: int, stop: int) -> str:
        return str(tokenizer.decode(list(ids[start:stop]), clean_up_tokenization_spaces=False))

    texts: list[str] = []
    told = 0
    for index in range(len(ids)):
        start = max(told - _CONTEXT, 0)
        before, now = decoded(start, told), decoded(start, index + 1)
        if now.endswith(_UNFINISHED) and index + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        told = index + 1
    return texts


def shown(text: str) -> str:
    """A token's text with nothing invisible in it: line breaks and tabs as signs, other control characters as codes.

    A token without text, a part of a character, is shown as a dot.
    """
    marks = {"\n": "↵", "\r": "␍", "\t": "⇥"}
    seen = (marks.get(c) or (f"\\u{ord(c):04x}" if unicodedata.category(c) in _UNSEEN else c) for c in text)
    return "".join(seen) or "·"
