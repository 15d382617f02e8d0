"""One answer, shown while it is generated."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from rich.cells import cell_len
from rich.console import Console


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
        text: the answer, without special tokens.
        steering: name of the adapter that steered; None for the base model.
        scale: run-time factor of its strength.
        gate: its gate for this prompt, 0 to 1; None if it has none.
        tokens: number of new tokens.
        seconds: time from the call to the last token.
        stopped: whether it was stopped before its end.
    """

    text: str
    steering: str | None
    scale: float
    gate: float | None
    tokens: int
    seconds: float
    stopped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The answer for `--json`, without what does not apply."""
        made: dict[str, Any] = {"text": self.text, "steering": self.steering}
        if self.steering is not None:
            made |= {"scale": self.scale} | ({} if self.gate is None else {"gate": round(self.gate, 4)})
        return {**made, "tokens": self.tokens, "stopped": self.stopped}


def stream_answer(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    *,
    steering: str | None = None,
    scale: float = 1.0,
    show: Callable[[str], None] = lambda text: None,
    stop: Event | None = None,
    **generate_kwargs: Any,
) -> Answer:
    """Generate one answer and show its pieces as they come.

    Args:
        model: a steered model.
        tokenizer: its tokenizer.
        ids: token ids of the prompt.
        steering: name of a loaded adapter; None for the base model.
        scale: run-time factor of its strength.
        show: called with each piece of text, in this thread.
        stop: ends the answer at its next token once it is set.
        **generate_kwargs: for `generate`, such as `max_new_tokens`.

    Raises:
        Exception: whatever `generate` raises in its thread.
    """
    import torch
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    from finesteer_hf.evaluation.measures.generation import end_token_ids, until_end
    from finesteer_hf.evaluation.measures.likelihood import model_device

    stop = stop or Event()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def ended(given: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((given.shape[0],), stop.is_set(), device=given.device)

    inputs = torch.tensor([ids], device=model_device(model))
    ends = end_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    outcome: list[Any] = []

    def run() -> None:
        try:
            # Steering is said in the call: this thread is in no block of the caller's.
            outcome.append(
                model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    steering=steering,
                    steering_scale=scale,
                    output_steering=True,
                    return_dict_in_generate=True,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([ended]),
                    pad_token_id=pad,
                    **generate_kwargs,
                )
            )
        except BaseException as error:
            outcome.append(error)
            # A reader would wait for an end that `generate` did not send.
            streamer.text_queue.put(streamer.stop_signal)

    started = time.perf_counter()
    thread = Thread(target=run, daemon=True)
    thread.start()
    pieces: list[str] = []
    for piece in streamer:
        pieces.append(piece)
        show(piece)
    thread.join()
    seconds = time.perf_counter() - started
    (output,) = outcome
    if isinstance(output, BaseException):
        raise output
    new = until_end(output.sequences[0, len(ids) :].tolist(), ends)
    gate = output.steering.get(steering, {}).get("gate") if steering is not None else None
    return Answer(
        text="".join(pieces).strip(),
        steering=steering,
        scale=scale,
        gate=None if gate is None else float(gate[0]),
        tokens=len(new),
        seconds=seconds,
        stopped=stop.is_set() and not (new and new[-1] in ends),
    )


class Wrapping:
    """Prints pieces of a text; on a terminal, lines break between words.

    Args:
        console: where to.
        indent: columns left free at the start of each line but the first.
        column: columns that are taken on the first line.
    """

    def __init__(self, console: Console, indent: int = 0, column: int = 0) -> None:
        self.console, self.indent, self.column = console, indent, column
        # What the pieces begin with is dropped until there is a word.
        self.space: str | None = None

    def __call__(self, piece: str) -> None:
        """Print a piece; a streamer's pieces end where words end."""
        for part in re.findall(r"\n|[^\S\n]+|\S+", piece):
            if part.isspace():
                if self.space is not None and part == "\n":
                    self._break()
                elif self.space is not None:
                    self.space += part
                continue
            space = self.space or ""
            over = self.column + cell_len(space + part) > self.console.width
            if self.console.is_terminal and over and self.column > self.indent:
                self._break()
                space = ""
            self._write(space + part)
            self.column += cell_len(space + part)
            self.space = ""
        self.console.file.flush()

    def end(self) -> None:
        """End the last line."""
        self._write("\n")
        self.console.file.flush()

    def _break(self) -> None:
        self._write("\n" + " " * self.indent)
        self.column, self.space = self.indent, ""

    def _write(self, text: str) -> None:
        self.console.file.write(text)
