"""An unsteered and a steered answer to one question, streamed side by side."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from finesteer_hf.decoder_layout import context_length
from finesteer_hf.evaluation.measures.generation import end_token_ids
from finesteer_hf.evaluation.measures.likelihood import model_device
from finesteer_hf.evaluation.measures.prompts import Prompt, as_chat, encode_prompt
from finesteer_hf.ui.workbench import Workbench
from finesteer_hf.views.by_token import SteeredTokens, steering_by_token


Side = Literal["unsteered", "steered"]
SIDES: tuple[Side, Side] = ("unsteered", "steered")
# Seconds between looks at whether the reader has gone.
_PATIENCE = 0.5


@dataclass(frozen=True)
class Reading:
    """What an adapter decided about a question.

    Attributes:
        gate: its gate, in [0, 1]; None if it has none.
        score: the score that the gate was computed from; None if it has none.
        experts: the weights of its experts, empty if it has none.
        relative_norm: norm of what is added as a share of the state's norm at the query; None if not recorded.
    """

    gate: float | None = None
    score: float | None = None
    experts: tuple[float, ...] = ()
    relative_norm: float | None = None

    @classmethod
    def of_record(cls, record: dict[str, torch.Tensor]) -> Reading:
        """The reading of the first row of what `output_steering` returns for an adapter."""

        def number(name: str) -> float | None:
            value = record.get(name)
            return float(value.reshape(-1)[0]) if isinstance(value, torch.Tensor) and value.numel() == 1 else None

        experts = record.get("experts")
        weights = tuple(experts.reshape(-1).tolist()) if isinstance(experts, torch.Tensor) else ()
        return cls(number("gate"), number("score"), weights, number("relative_norm"))


@dataclass(frozen=True)
class Pair:
    """Both answers so far.

    Attributes:
        unsteered: text of the unsteered answer.
        steered: text of the steered answer.
        reading: what the adapter decided; None until the steered answer is complete.
        view: where steering acted; None until both answers are complete.
        done: whether all of it is there.
    """

    unsteered: str = ""
    steered: str = ""
    reading: Reading | None = None
    view: SteeredTokens | None = None
    done: bool = False


@dataclass(frozen=True)
class Question:
    """A question and how it is answered.

    Attributes:
        text: the question.
        adapter: name of a loaded adapter.
        scale: multiplies the adapter's strength.
        system: system message; "" for none.
        max_new_tokens: most tokens of an answer.
    """

    text: str
    adapter: str
    scale: float = 1.0
    system: str = ""
    max_new_tokens: int = 64

    def prompt(self, tokenizer: Any) -> Prompt:
        """A chat if the tokenizer has a template, else the text.

        Raises:
            ValueError: if the text is empty, or there is a system message and no template.
        """
        text, system = self.text.strip(), self.system.strip()
        if not text:
            raise ValueError("Type a question first.")
        if tokenizer.chat_template:
            return as_chat(text, system or None)
        if system:
            raise ValueError(
                "This model's tokenizer has no chat template, so it takes no system message. Leave it out."
            )
        return text


def answer_pair(bench: Workbench, question: Question) -> Iterator[Pair]:
    """Answer a question greedily, unsteered and steered at the same time.

    Closing the iterator stops both answers.

    Args:
        bench: the model.
        question: the question.

    Yields:
        The answers whenever one has grown; the last pair is `done`.

    Raises:
        ValueError: if the question is empty, longer than the model's context or the adapter is not loaded.
    """
    bench.adapter(question.adapter)
    ids = encode_prompt(bench.tokenizer, question.prompt(bench.tokenizer))
    longest = context_length(bench.model)
    if longest is not None and len(ids) + question.max_new_tokens > longest:
        raise ValueError(
            f"The question has {len(ids)} tokens, and {question.max_new_tokens} are for the answer: more than the "
            f"{longest} that {bench.name} reads. Shorten the question, or ask for fewer tokens."
        )
    run = _PairRun(bench, question, ids)
    try:
        yield from run.pairs()
    finally:
        run.stopped.set()


class _PairRun:
    """Two `generate` calls in threads of their own, and the queue of what they say."""

    def __init__(self, bench: Workbench, question: Question, ids: list[int]) -> None:
        self.bench, self.question = bench, question
        self.ids = torch.tensor([ids], device=model_device(bench.model))
        self.said: queue.SimpleQueue[tuple[Side, Any] | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.steered_ids: list[int] = []

    def pairs(self) -> Iterator[Pair]:
        threading.Thread(target=self._both, daemon=True).start()
        pair = Pair()
        yield pair
        while (event := self.said.get()) is not None:
            side, what = event
            if isinstance(what, BaseException):
                raise what
            if isinstance(what, Reading):
                pair = replace(pair, reading=what)
            elif isinstance(what, SteeredTokens):
                pair = replace(pair, view=what)
            elif side == "steered":
                pair = replace(pair, steered=pair.steered + what)
            else:
                pair = replace(pair, unsteered=pair.unsteered + what)
            yield pair
        yield replace(pair, done=True)

    def _both(self) -> None:
        # The lock is held here and not by the iterator: one that is dropped half-way would never give it back.
        try:
            while not self.bench.lock.acquire(timeout=_PATIENCE):
                if self.stopped.is_set():
                    return
            try:
                threads = [threading.Thread(target=self._one, args=(side,), daemon=True) for side in SIDES]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if not self.stopped.is_set():
                    self._look()
            finally:
                self.bench.lock.release()
        finally:
            self.said.put(None)

    def _one(self, side: Side) -> None:
        name = self.question.adapter if side == "steered" else None
        try:
            with torch.inference_mode():
                output = self.bench.model.generate(
                    input_ids=self.ids,
                    attention_mask=torch.ones_like(self.ids),
                    max_new_tokens=self.question.max_new_tokens,
                    do_sample=False,
                    pad_token_id=min(end_token_ids(self.bench.model, self.bench.tokenizer), default=0),
                    streamer=_Streamer(self.bench.tokenizer, side, self.said),
                    stopping_criteria=StoppingCriteriaList([_Stop(self.stopped)]),
                    steering=name,
                    steering_scale=self.question.scale,
                    return_dict_in_generate=True,
                    output_steering=True,
                )
            if name is not None:
                self.steered_ids = output.sequences[0, self.ids.shape[1] :].tolist()
                self.said.put((side, Reading.of_record(output.steering.get(name, {}))))
        except Exception as error:
            self.stopped.set()
            self.said.put((side, error))

    def _look(self) -> None:
        """Read once more, over the whole text, how far each token was moved."""
        try:
            view = steering_by_token(
                self.bench.model,
                self.bench.tokenizer,
                self.ids[0].tolist(),
                steering=self.question.adapter,
                steering_scale=self.question.scale,
                answer=self.steered_ids,
            )
            self.said.put(("steered", view))
        except Exception as error:
            self.said.put(("steered", error))


class _Streamer(TextStreamer):
    """Puts finished pieces of text into a queue."""

    def __init__(self, tokenizer: Any, side: Side, said: queue.SimpleQueue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.side, self.said = side, said

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.said.put((self.side, text))


class _Stop(StoppingCriteria):
    """Ends both answers once nobody reads them."""

    def __init__(self, stopped: threading.Event) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)
