"""What `finesteer generate` reads: prompts, lines of text, or JSONL."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finesteer_hf.errors import DatasetError


@dataclass(frozen=True)
class Asked:
    """One prompt to answer.

    Attributes:
        prompt: a text, or chat messages.
        row: the object that it came from, if it came from JSONL.
    """

    prompt: str | list[dict[str, Any]]
    row: dict[str, Any] | None = None

    @property
    def shown(self) -> str:
        """The prompt on the screen: a text, or the last message."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])


def read_prompts(prompts: list[str] | None, path: Path | None) -> list[Asked]:
    """Read the prompts of one source: options, a file, or stdin.

    Args:
        prompts: texts of `--prompt`.
        path: a file; `-` is stdin, which is also read if neither is given.

    Raises:
        ValueError: if two sources are given, or the source is empty.
        FileNotFoundError: if there is no such file.
        DatasetError: for a line of JSONL without a prompt; names the line.
    """
    if prompts and path is not None:
        raise ValueError("Give --prompt or --input, not both.")
    if prompts:
        return [Asked(text) for text in prompts]
    if path is not None and str(path) != "-":
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. Give the prompt itself as --prompt TEXT.")
        asked = parse_lines(path.read_text(encoding="utf-8").splitlines(), path.suffix == ".jsonl", path.name)
        if not asked:
            raise ValueError(f"{path} holds no prompts: write one a line.")
        return asked
    if sys.stdin.isatty():
        print("Write prompts, one a line; ctrl-D ends.", file=sys.stderr)
    asked = parse_lines(sys.stdin, False, "stdin")
    if not asked:
        raise ValueError("Give --prompt TEXT, --input FILE, or lines of text on standard input.")
    return asked


def parse_lines(lines: Iterable[str], as_jsonl: bool, source: str) -> list[Asked]:
    """Parse one prompt a line; blank lines are left out.

    Args:
        lines: the lines.
        as_jsonl: whether each line must be an object; if not, lines are JSONL if the first one is an object with a prompt.
        source: name for the message.

    Raises:
        DatasetError: for a line of JSONL without a prompt.
    """
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if numbered and not as_jsonl:
        first = _object(numbered[0][1])
        as_jsonl = first is not None and ("prompt" in first or "messages" in first)
    if not as_jsonl:
        return [Asked(line) for _, line in numbered]
    return [_asked(line, f"line {number} of {source}") for number, line in numbered]


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _asked(line: str, where: str) -> Asked:
    row = _object(line)
    if row is None:
        raise DatasetError(f'{where} is not a JSON object: write {{"prompt": "..."}} or {{"messages": [...]}}.')
    if "messages" in row:
        messages = row["messages"]
    else:
        messages = row.get("prompt")
        if isinstance(messages, str) and messages.strip():
            return Asked(messages, row)
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
    ):
        raise DatasetError(
            f'{where} has no prompt: write "prompt" with a text, or "messages" with a list of {{"role", "content"}}. '
            f"Its fields: {', '.join(sorted(row)) or 'none'}."
        )
    if messages[-1]["role"] == "assistant":
        raise DatasetError(f"{where} ends with an assistant's message, so there is nothing to answer.")
    return Asked(messages, row)
