"""What a chat holds: its messages, what steers, and the answers of a turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from finesteer_hf.cli.asking.streaming import Answer, stream_answer
from finesteer_hf.decoder_layout import context_length


@dataclass
class Turns:
    """A model and the conversation with it.

    Attributes:
        model: a steered model.
        tokenizer: its tokenizer, with a chat template.
        system: system message, if any.
        max_new_tokens: most tokens of an answer.
        sampling: arguments of `generate` for the choice of tokens.
        messages: the conversation, without the system message.
    """

    model: Any
    tokenizer: Any
    system: str | None
    max_new_tokens: int
    sampling: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)

    def ids(self) -> list[int]:
        """Token ids of the conversation, through the chat template, up to where the answer begins."""
        from finesteer_hf.evaluation.measures.prompts import encode_prompt

        first = [{"role": "system", "content": self.system}] if self.system else []
        return encode_prompt(self.tokenizer, [*first, *self.messages])

    def room(self, ids: list[int]) -> int:
        """Tokens that an answer may have after a prompt.

        Raises:
            ValueError: if the model's context is full.
        """
        context = context_length(self.model)
        left = self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(ids))
        if left < 1:
            raise ValueError(
                f"The conversation has {len(ids)} tokens, and the model's context {context}: /reset begins a new one."
            )
        return left


@dataclass
class ChatSession:
    """A chat's settings, and its turns.

    Attributes:
        turns: the conversation.
        active: name of the adapter that steers; None for none.
        scale: factor of its strength.
        compare: whether answers come twice, unsteered and steered.
        before: name of the adapter that steered before /off.
        stop: set to end the running answer.
    """

    turns: Turns
    active: str | None = None
    scale: float = 1.0
    compare: bool = False
    before: str | None = None
    stop: Event = field(default_factory=Event)

    @property
    def adapters(self) -> dict[str, Any]:
        """The loaded adapters by name."""
        return dict(self.turns.model.steering_adapters)

    def conditions(self) -> list[str | None]:
        """What steers each answer of the next turn."""
        return [None, self.active] if self.compare and self.active is not None else [self.active]

    def ask(self, text: str, begin: Callable[[str | None], Callable[[str], None]]) -> Iterator[Answer]:
        """Answer a message. The conversation goes on from the last answer, the steered one.

        Args:
            text: the user's message.
            begin: called before each answer with the name of its adapter; returns what shows pieces of it.

        Raises:
            ValueError: if the context is full; the message is then not part of the conversation.
        """
        turns, self.stop = self.turns, Event()
        turns.messages.append({"role": "user", "content": text})
        answer = None
        try:
            ids = turns.ids()
            room = turns.room(ids)
            for steering in self.conditions():
                if self.stop.is_set():
                    break
                answer = stream_answer(
                    turns.model,
                    turns.tokenizer,
                    ids,
                    steering=steering,
                    scale=self.scale,
                    show=begin(steering),
                    stop=self.stop,
                    max_new_tokens=room,
                    **turns.sampling,
                )
                yield answer
        finally:
            if answer is None:
                turns.messages.pop()
            else:
                turns.messages.append({"role": "assistant", "content": answer.text})
