"""`finesteer generate`: what it reads, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_toys import half_plane_adapter
from rich.console import Console
from typer.testing import CliRunner

from finesteer_hf.cli.asking import generate as command
from finesteer_hf.cli.asking.inputs import Asked, parse_lines, read_prompts
from finesteer_hf.cli.commands import app
from finesteer_hf.errors import DatasetError


CHAT = [{"role": "user", "content": "sing a song"}]


@pytest.fixture
def folders(model: Any, tokenizer: Any, half_plane: None, tmp_path: Path) -> list[str]:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    half_plane_adapter(torch.ones(32), hidden_size=32, num_hidden_layers=3).save_pretrained(adapter)
    return ["generate", str(base), "-s", str(adapter), "--max-new-tokens", "4"]


def run(arguments: list[str], text: str | None = None, code: int = 0) -> Any:
    result = CliRunner().invoke(app, arguments, input=text)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_lines_are_prompts_and_objects_are_rows() -> None:
    assert parse_lines(["one\n", " \n", "two "], False, "x") == [Asked("one"), Asked("two")]
    rows = [{"prompt": "one", "id": 3}, {"messages": CHAT}, {"prompt": CHAT}]
    parsed = parse_lines(map(json.dumps, rows), False, "x")
    assert parsed == [Asked("one", rows[0]), Asked(CHAT, rows[1]), Asked(CHAT, rows[2])]
    assert parsed[1].shown == "sing a song"
    # A line of code is a prompt.
    assert parse_lines(['{"a": 1}', "[1]"], False, "x") == [Asked('{"a": 1}'), Asked("[1]")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json", "line 2 of f.jsonl is not a JSON object"),
        ('{"text": "x"}', "Its fields: text"),
        ('{"prompt": ""}', "has no prompt"),
        ('{"messages": []}', "has no prompt"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "nothing to answer"),
    ],
)
def test_a_bad_row_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(f'{{"prompt": "one"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        read_prompts(None, path)


def test_one_source_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        read_prompts(["a"], tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_prompts(None, tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(None, tmp_path / "empty.txt")


def test_jsonl_keeps_its_fields_and_becomes_jsonl(folders: list[str], tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "tell me about cats"}, {"messages": CHAT, "tags": ["é"]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = [json.loads(line) for line in run([*folders, "--input", str(path)]).stdout.splitlines()]
    assert [{key: row[key] for key in given} for row, given in zip(found, rows, strict=True)] == rows
    assert all({"unsteered", "steered", "gate"} <= set(row) for row in found)
    # From stdin too, and the answers are those of the prompts given one by one.
    piped = [json.loads(line) for line in run(folders, text=path.read_text()).stdout.splitlines()]
    assert piped == found
    alone = json.loads(run([*folders, "-p", "tell me about cats", "--json"]).stdout)
    assert {**found[0]} == {"id": 7, **alone}
    assert "chat messages" in run([*folders, "--plain"], text=json.dumps(rows[1]), code=1).stderr


def test_a_text_file_has_a_prompt_a_line(folders: list[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("tell me about cats\n\nsing a song\n")
    output = run([*folders, "-i", str(path), "--no-compare"]).stdout
    assert output.count("steered (gate ") == 2 and "unsteered" not in output


def test_one_prompt_on_a_terminal_streams(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*folders, "-p", "tell me about cats"]
    plain = run(arguments).stdout
    monkeypatch.setattr(command, "console", Console(force_terminal=True, width=200, no_color=True, highlight=False))
    calls: list[Any] = []
    usual = command.stream_one
    monkeypatch.setattr(command, "stream_one", lambda *given: (calls.append(given), usual(*given)))
    streamed = run(arguments).stdout
    assert len(calls) == 1
    answers = [line.split(": ", 1)[1] for line in plain.splitlines()[1:]]
    assert all(answer in streamed for answer in answers) and "(gate " in streamed
    run([*arguments, "-p", "sing a song"])
    assert len(calls) == 1
