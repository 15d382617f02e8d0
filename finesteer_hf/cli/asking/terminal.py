"""The loop of a chat: reads lines, shows answers, and gives ctrl-C its two meanings."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.markup import escape

from finesteer_hf.cli import interruption
from finesteer_hf.cli.asking import slash
from finesteer_hf.cli.asking.session import ChatSession
from finesteer_hf.cli.asking.streaming import Answer, Wrapping
from finesteer_hf.cli.common import console, errors
from finesteer_hf.cli.friendly import FORESEEN, show_error


PROMPT = "> "


class ChatLoop:
    """Reads lines until the end, answers them, and runs slash commands.

    Args:
        session: the chat.
        as_json: whether each turn is one line of JSON.
    """

    def __init__(self, session: ChatSession, as_json: bool) -> None:
        self.session, self.as_json = session, as_json
        self.at_terminal = sys.stdin.isatty()
        self.answering = False
        # Presses of ctrl-C since the last line.
        self.presses = 0

    def run(self) -> None:
        """Run the chat.

        Raises:
            typer.Exit: with code 130 after ctrl-C twice.
        """
        with self._presses_counted(), contextlib.suppress(slash.Quit, EOFError):
            while True:
                try:
                    line = self._read()
                except KeyboardInterrupt:
                    # The prompt's line has not ended.
                    print(file=sys.stderr)
                    if self.presses > 1:
                        raise typer.Exit(interruption.STOPPED) from None
                    errors.print("[dim]ctrl-C again ends the chat[/]")
                    continue
                self.presses = 0
                if line.strip():
                    self._take(line.strip())
                if self.presses > 1:
                    raise typer.Exit(interruption.STOPPED)

    def _take(self, line: str) -> None:
        try:
            if line.startswith("/"):
                slash.run(self.session, line)
            else:
                self._answer(line)
        except FORESEEN as error:
            show_error(error, debug=False)
            if not self.at_terminal:
                raise typer.Exit(1) from error

    def _answer(self, text: str) -> None:
        answers: list[Answer] = []
        shown: list[Wrapping] = []

        def begin(steering: str | None) -> Callable[[str], None]:
            if self.as_json:
                return lambda piece: None
            if len(self.session.conditions()) > 1:
                console.print(f"[cyan]{escape(steering or 'unsteered')}:[/]", highlight=False)
            shown.append(Wrapping(console))
            return shown[-1]

        self.answering = True
        try:
            for answer in self.session.ask(text, begin):
                answers.append(answer)
                if not self.as_json:
                    shown[-1].end()
                    errors.print(f"[dim]{escape(remark(answer))}[/]", highlight=False)
        finally:
            self.answering = False
        if self.as_json:
            found: dict[str, Any] = {"prompt": text, "answers": [answer.to_dict() for answer in answers]}
            typer.echo(json.dumps(found, ensure_ascii=False))

    def _read(self) -> str:
        """The next line.

        Raises:
            EOFError: at the end of the input.
        """
        if self.at_terminal and sys.stdout.isatty():
            return input(PROMPT)
        if self.at_terminal:
            # `input` would write its prompt among the answers.
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    @contextlib.contextmanager
    def _presses_counted(self) -> Iterator[None]:
        """Ctrl-C stops the running answer; elsewhere, and when pressed again, it raises KeyboardInterrupt."""

        def pressed(number: int, frame: Any) -> None:
            self.presses += 1
            if self.answering and self.presses == 1:
                self.session.stop.set()
                return
            if self.answering and self.presses > 2:
                interruption.leave()
            if not self.answering:
                raise KeyboardInterrupt

        if self.at_terminal and sys.stdout.isatty():
            _complete_commands(self.session)
        usual = signal.signal(signal.SIGINT, pressed)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, usual)


def remark(answer: Answer) -> str:
    """What stands below an answer: what steered it, its gate, its speed."""
    speed = f"{answer.tokens} tokens, {answer.tokens / max(answer.seconds, 1e-9):.0f}/s"
    parts = [speed] if not answer.stopped else [speed, "stopped; ctrl-C again ends the chat"]
    if answer.steering is None:
        return "; ".join(["unsteered", *parts])
    gate = "no gate" if answer.gate is None else f"gate {answer.gate:.2f} {gauge(answer.gate)}"
    return "; ".join([f"{answer.steering} x {answer.scale:g}", gate, *parts])


def gauge(gate: float, width: int = 10) -> str:
    """A gate as a bar."""
    full = round(max(0.0, min(1.0, gate)) * width)
    return "█" * full + "░" * (width - full)


def _complete_commands(session: ChatSession) -> None:
    """Let the tab key complete slash commands and names of adapters, and the arrow keys recall lines."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        words = list(session.adapters) if line.startswith("/steer ") else list(slash.HELP)
        found = [word for word in words if line.startswith("/") and word.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
