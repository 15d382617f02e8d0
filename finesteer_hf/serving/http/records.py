"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from finesteer_hf.serving.http.errors import finite
from finesteer_hf.serving.sampling import TokenLogprob
from finesteer_hf.serving.text import UNFINISHED


Record = tuple[int, TokenLogprob]
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Texts and bytes of single tokens.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = functools.lru_cache(65_536)(self._text)

    def _text(self, token: int) -> str:
        # Special tokens too: an alternative that ends the turn is worth seeing.
        return self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def bytes(self, token: int) -> list[int] | None:
        """A token's bytes; None where its text is part of a character and its piece does not say of which."""
        text = self.text(token)
        if UNFINISHED not in text:
            return list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if match := _BYTE.fullmatch(piece):
            return [int(match[1], 16)]
        table = byte_of_character()
        return [table[c] for c in piece] if all(c in table for c in piece) else None

    def chat(self, records: Sequence[Record]) -> dict[str, Any]:
        """`logprobs` of a chat answer, or of a chunk of one."""
        return {"content": [self._entry(r) for _, r in records], "refusal": None}

    def _entry(self, record: TokenLogprob) -> dict[str, Any]:
        top = [self._one(token, logprob) for token, logprob in record.top]
        return {**self._one(record.token, record.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        # OpenAI's floor for what has no probability: JSON has no infinity.
        value = finite(logprob)
        return {
            "token": self.text(token),
            "logprob": -9999.0 if value is None else value,
            "bytes": self.bytes(token),
        }

    def completion(self, records: Sequence[Record]) -> dict[str, Any]:
        """`logprobs` of a completion, or of a chunk of one; offsets count from the answer's beginning."""
        entries = [self._entry(record) for _, record in records]
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{each["token"]: each["logprob"] for each in entry["top_logprobs"]} for entry in entries],
            "text_offset": [offset for offset, _ in records],
        }


@functools.cache
def byte_of_character() -> dict[str, int]:
    """What byte each character of a byte-level tokenizer's pieces stands for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
