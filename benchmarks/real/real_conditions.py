"""One way to ask the real model: unsteered, with a system prompt, steered at some scale, or with LoRA.

What measures a row of the study sees only this, so steered models, PEFT models and prompted ones are measured alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from finesteer_hf.evaluation.measures.generation import Answers, greedy_answers
from finesteer_hf.evaluation.measures.likelihood import is_steerable
from finesteer_hf.evaluation.measures.prompts import Prompt, as_chat, encode_prompt


@dataclass(frozen=True)
class Condition:
    """A model, what is switched on in it, and what stands before the question.

    Attributes:
        model: a causal LM, plain, steered or PEFT's.
        tokenizer: its tokenizer.
        adapter: name of the loaded steering adapter that steers; None for none.
        scale: run-time factor of its strength.
        system: system message; None leaves it to the chat template, which may have its own.
        lora: whether the model's LoRA is on.
    """

    model: Any
    tokenizer: Any
    adapter: str | None = None
    scale: float = 1.0
    system: str | None = None
    lora: bool = False

    def on(self) -> AbstractContextManager[Any]:
        """A block in which the model is asked this way."""
        if self.adapter is not None:
            return self.model.steering(self.adapter, scale=self.scale)
        if self.lora:
            return nullcontext()
        if is_steerable(self.model):
            return self.model.disable_steering()
        return self.model.disable_adapter() if hasattr(self.model, "peft_config") else nullcontext()

    def base(self) -> Condition:
        """The same model with nothing on and the template's own system message."""
        return Condition(self.model, self.tokenizer)

    def at(self, scale: float) -> Condition:
        """The same, stronger or weaker."""
        return dataclasses.replace(self, scale=scale)

    def prompt(self, text: str) -> Prompt:
        """What a user says, as a chat."""
        return as_chat(text, self.system)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of what a user says, up to where the answer begins."""
        return encode_prompt(self.tokenizer, self.prompt(text))

    def answers(self, texts: Sequence[str], max_new_tokens: int) -> Answers:
        """Greedy answers, in padded batches."""
        with self.on():
            return greedy_answers(
                self.model,
                self.tokenizer,
                [self.prompt(text) for text in texts],
                max_new_tokens=max_new_tokens,
                batch_tokens=BATCH_TOKENS,
            )


# Padded tokens of a batch, new ones included: about a hundred short questions, where one core decodes fastest.
BATCH_TOKENS = 8192
