"""From tokens to text as they come: no half characters, and stop strings cut exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


# What a decoder puts where bytes are no character, or no whole one yet.
UNFINISHED = "\ufffd"


class IncrementalText:
    """The text of a growing list of tokens; a character appears once all of its bytes are there.

    A token's text depends on the token before it (leading blanks, bytes of one character), so each is decoded behind
    those that the last released text came from, and what is new is the difference.

    Args:
        tokenizer: of transformers, fast or slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._before = 0
        self._released = 0

    def push(self, token: int) -> str:
        """Add a token; gives the text that is certain now, often of this token, sometimes nothing."""
        self._tokens.append(token)
        text = self._new()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._before, self._released = self._released, len(self._tokens)
        return text

    def end(self) -> str:
        """The rest: bytes that no further token completes, as replacement characters."""
        text = self._new()
        self._before, self._released = self._released, len(self._tokens)
        return text

    def _new(self) -> str:
        before = decode(self._tokenizer, self._tokens[self._before : self._released])
        return decode(self._tokenizer, self._tokens[self._before :])[len(before) :]


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, and holds back what may be the beginning of one.

    Args:
        stops: strings that end the text; none of them is part of it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Add a piece; gives the text that can be released, and whether a stop string came."""
        text = self._held + piece
        # The one that is complete first, so that it does not matter in which pieces the text comes.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def end(self) -> str:
        """What was held back and turned out to be text."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of a stop string, and not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text of tokens, special ones left out, and nothing tidied: a tidied text is no beginning of a longer one."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
