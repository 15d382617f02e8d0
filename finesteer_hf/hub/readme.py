"""An untrusted README: its metadata block, and the sections between our markers.

Parsing takes linear time. A README that cannot be parsed safely raises `ReadmeError` and is left unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


CARD_NAME = "README.md"
# Far above any README and any metadata; a YAML parser takes seconds for a megabyte.
MOST_README_BYTES = 1 << 20
MOST_METADATA_CHARACTERS = 1 << 16
MOST_BRACKETS = 500
_MOST_VALUES = 10_000
_DEEPEST = 20
_FENCE = "---"


class ReadmeError(ValueError):
    """A README that cannot be merged."""


@dataclass(frozen=True)
class Readme:
    """A README in its two parts.

    Attributes:
        metadata: its YAML block, parsed.
        block: the block as it was written, `---` lines included; empty if there is none.
        text: what follows.
        newline: the line ends that the file uses.
    """

    metadata: dict[str, Any]
    block: str
    text: str
    newline: str

    @classmethod
    def read(cls, path: Path) -> Readme:
        """Read a file; a missing one is empty.

        Raises:
            ReadmeError: if it is too large, not UTF-8, or its metadata is not a YAML mapping as a README has.
        """
        if not path.exists():
            return cls({}, "", "", "\n")
        if path.stat().st_size > MOST_README_BYTES:
            raise ReadmeError(f"it has {path.stat().st_size} bytes; at most {MOST_README_BYTES} are read")
        try:
            return cls.parse(path.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ReadmeError(f"it is not UTF-8 text ({error})") from error

    @classmethod
    def parse(cls, raw: str) -> Readme:
        """Parse a text; errors as for `read`."""
        newline = "\r\n" if "\r\n" in raw else "\n"
        raw = raw.replace("\r\n", "\n")
        start = len(raw) - len(raw.lstrip())
        first = raw[start:].partition("\n")[0]
        if first.rstrip(" \t") != _FENCE:
            return cls({}, "", raw, newline)
        inside = start + len(first)
        stop = _fence_after(raw, inside)
        if stop is None:
            # A horizontal rule above the text, not a block.
            return cls({}, "", raw, newline)
        line_end = raw.find("\n", stop + 1)
        after = len(raw) if line_end < 0 else line_end + 1
        return cls(_metadata(raw[inside:stop]), raw[:after], raw[after:], newline)

    def write(self, metadata: dict[str, Any], text: str) -> str:
        """The whole README with new metadata and text."""
        block = self.block
        # Rewritten only if it changes, to keep the user's comments and order.
        if not block or metadata != self.metadata:
            block = f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"
        return f"{block}{text if text.startswith(chr(10)) else chr(10) + text}".replace("\n", self.newline)

    def texts(self, name: str) -> list[str]:
        """A metadata entry that holds one string or several."""
        value = self.metadata.get(name)
        return [value] if isinstance(value, str) else list(value or [])


def _fence_after(raw: str, position: int) -> int | None:
    """Position of the line break before the next `---` line."""
    while (position := raw.find(f"\n{_FENCE}", position)) >= 0:
        end = raw.find("\n", position + 1)
        if not raw[position + 1 + len(_FENCE) : len(raw) if end < 0 else end].strip(" \t"):
            return position
        position += 1
    return None


def _metadata(block: str) -> dict[str, Any]:
    if len(block) > MOST_METADATA_CHARACTERS:
        raise ReadmeError(
            f"its metadata block has {len(block)} characters; at most {MOST_METADATA_CHARACTERS} are read"
        )
    if block.count("[") + block.count("{") > MOST_BRACKETS:
        # The parser's time grows with the square of their depth.
        raise ReadmeError(f"its metadata block cannot be read (it has more than {MOST_BRACKETS} brackets)")
    try:
        found = yaml.safe_load(block)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ReadmeError(f"its metadata block cannot be read ({str(error)[:200]})") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ReadmeError("its metadata block cannot be read (it must be a mapping of names)")
    # With aliases, a few lines can exceed any memory, and a block can contain itself.
    left = _MOST_VALUES
    waiting: list[tuple[Any, int]] = [(found, 0)]
    while waiting:
        value, depth = waiting.pop()
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise ReadmeError("its metadata block cannot be read (it is too large or nested too deeply)")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        waiting += [(item, depth + 1) for item in inner]
    for name in ("tags", "base_model"):
        value = found.get(name)
        entries = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(entry, str) for entry in entries):
            raise ReadmeError(f"its metadata block cannot be read ({name} must be a string or a list of strings)")
    return found


@dataclass(frozen=True)
class Section:
    """A part of a text between two markers, each at the start of a line.

    Attributes:
        begin: start of the first marker.
        end: end of the last marker.
        header: the rest of the first marker's line, without the end of the comment.
        body: the text between the marker lines.
    """

    begin: int
    end: int
    header: str
    body: str

    @classmethod
    def find(cls, text: str, first: str, last: str) -> Section | None:
        """Find a section by the starts of its marker lines; None if it is missing or incomplete."""
        begin = None
        for marker in re.finditer(f"^(?:{re.escape(first)}|{re.escape(last)})", text, re.MULTILINE):
            if marker.group() == first:
                # The first marker nearest before a last one: text after an unclosed first marker is the user's.
                begin = marker.start()
            elif begin is not None:
                line_end = text.find("\n", begin)
                header = text[begin + len(first) : line_end].rstrip().removesuffix("-->").strip()
                return cls(begin, marker.end(), header, text[line_end + 1 : marker.start()])
        return None


def put_section(text: str, section: Section | None, ours: str) -> str:
    """Replace the old section, or append at the end."""
    if section is not None:
        return text[: section.begin] + ours + text[section.end :]
    return f"{text.rstrip()}\n\n{ours}\n" if text.strip() else f"{ours}\n"


def merge_metadata(theirs: dict[str, Any], ours: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Merge metadata: a user's value wins unless it is what we wrote last time; tags are merged.

    Args:
        theirs: the README's.
        ours: what we write now.
        before: what we wrote last time.
    """
    merged = {k: v for k, v in theirs.items() if k == "tags" or k not in before or before[k] != v or k in ours}
    for key, value in ours.items():
        if key == "tags":
            present = theirs.get("tags") or []
            present = [present] if isinstance(present, str) else list(present)
            written = before.get("tags")
            gone = written if isinstance(written, list) else []
            merged["tags"] = list(dict.fromkeys([*(tag for tag in present if tag not in gone), *value]))
        elif key not in theirs or theirs[key] == before.get(key):
            merged[key] = value
    return merged
