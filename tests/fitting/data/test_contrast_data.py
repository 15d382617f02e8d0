"""Rows in all of TRL's forms, and errors that name the bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting.data.rows import PromptRow, check_contrast, read_preferences, read_prompts


USER = {"role": "user", "content": "sun0"}
GOOD, BAD = {"role": "assistant", "content": "oak0"}, {"role": "assistant", "content": "fox0"}
ROW = {"prompt": "sun0", "chosen": " oak0", "rejected": " fox0"}
ROWS = [{**ROW, "prompt": f"sun{i}"} for i in range(4)]


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "sun0", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "sun0", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "oak0", "rejected": "fox0"},
    ],
)
def test_chats_in_all_forms_are_the_same_row(record: dict[str, Any]) -> None:
    (row,) = read_preferences([record]).rows
    assert (row.prompt, row.chosen, row.rejected) == ([USER], [GOOD], [BAD])


def test_a_system_message_is_part_of_an_implicit_prompt() -> None:
    system = {"role": "system", "content": "sea0"}
    (row,) = read_preferences([{"chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]}]).rows
    assert row.prompt == [system, USER]


def test_an_implicit_prompt_in_text_ends_at_a_word() -> None:
    (row,) = read_preferences([{"chosen": "Is it so? Absolutely", "rejected": "Is it so? About"}]).rows
    assert (row.prompt, row.chosen, row.rejected) == ("Is it so?", " Absolutely", " About")


def test_group_and_number_are_kept() -> None:
    rows = read_preferences([{**ROW, "category": 3, "id": 17}, {**ROW, "category": "x"}]).rows
    assert [(row.group, row.number) for row in rows] == [("3", 0), ("x", 1)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"question": "a", "chosen": "b", "rejected": "c"}], r"have no common beginning"),
        ([{"prompt": "a", "good": "b", "rejected": "c"}], r"no column 'chosen'.*\['good', 'prompt', 'rejected'\]"),
        ([ROW, {"prompt": "a", "chosen": "b"}, ROW], r"row 1 \(counted from 0\): no 'rejected'"),
        ([ROW, {**ROW, "chosen": " fox0"}, {**ROW, "chosen": " fox0"}], r"rows 1, 2 .*are the same"),
        ([ROW, {**ROW, "rejected": "  "}], r"row 1 .*rejected is empty"),
        ([ROW, {**ROW, "prompt": ""}], r"row 1 .*prompt is empty"),
        ([ROW, {**ROW, "chosen": 3}], r"row 1 .*chosen must be text or a list of messages, got int"),
        ([ROW, {**ROW, "prompt": [{"role": "user"}]}], r"row 1 .*'role' and 'content'"),
        ([ROW, {**ROW, "prompt": [USER, GOOD]}], r"row 1 .*ends with an assistant message"),
        ([{"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}], r"row 0 .*must end with .*'assistant'"),
        ([{"chosen": [USER, GOOD], "rejected": "x"}], r"both be text or both be messages"),
        ([{"chosen": [USER], "rejected": [USER, GOOD]}], r"one answer is the beginning of the other"),
        ([{**ROW, "category": "x"}, ROW], r"row 1 .*no category"),
    ],
)
def test_rows_that_cannot_be_fitted_are_named(records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_preferences(records)


def test_many_rows_are_shortened_and_other_problems_counted() -> None:
    records = [{**ROW, "chosen": ""} for _ in range(30)] + [{**ROW, "chosen": 3}]
    with pytest.raises(DatasetError, match=r"rows 0, 1, .*, 9 and 20 more.*empty.*1 other kind of problem"):
        read_preferences(records)


def test_one_row_and_one_prompt_are_too_few() -> None:
    with pytest.raises(DatasetError, match="has 1 row"):
        check_contrast(read_preferences(ROWS[:1]).rows)
    with pytest.raises(DatasetError, match="all 3 rows have the same prompt"):
        check_contrast(read_preferences([ROW] * 3).rows)


def test_general_prompts_are_checked_too() -> None:
    assert read_prompts([{"prompt": "a"}, {"prompt": [USER]}]).rows == [PromptRow("a"), PromptRow([USER], number=1)]
    with pytest.raises(DatasetError, match=r"row 1 .*prompt is empty"):
        read_prompts([{"prompt": "a"}, {"prompt": " "}])
    with pytest.raises(DatasetError, match="no column 'prompt'"):
        read_prompts([{"text": "a"}])


@pytest.mark.parametrize(
    "form", ["list", "generator", "dataset", "stream", "jsonl", "json", "csv", "tsv", "parquet", "folder"]
)
def test_every_source_gives_the_same_rows(form: str, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"rows.{form}"
    source: Any = path
    if form == "list":
        source = ROWS
    elif form == "generator":
        source = (row for row in ROWS)
    elif form == "dataset":
        source = table
    elif form == "stream":
        source = table.to_iterable_dataset()
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    elif form in ("csv", "tsv"):
        mark = "," if form == "csv" else "\t"
        lines = [mark.join(ROW), *(mark.join(row.values()) for row in ROWS)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    elif form == "parquet":
        table.to_parquet(str(path))
    else:
        table.save_to_disk(str(path))
    expected = read_preferences(ROWS)
    read = read_preferences(source)
    assert read.rows == expected.rows and read.findings == []
    found = read.source
    assert (found.rows, found.taken) == (4, 4)
    # As it was when a data set was read whole.
    assert found.sha256 == expected.source.sha256 == "a25751f13837fe2a02a4b19411fa6269ce749213085a3933305d9571b5b09c75"
    assert found.name == (None if form in ("list", "generator", "dataset", "stream") else path.name)


def test_invalid_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is empty"):
        read_preferences([])
    with pytest.raises(DatasetError, match=r"row 1 .*must be a dict, got str"):
        read_preferences([ROW, "sun0"])
    with pytest.raises(DatasetError, match=r"has the splits \['test', 'train'\]"):
        read_preferences(
            datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS))
        )
    with pytest.raises(DatasetError, match="got int"):
        read_preferences(3)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_preferences(tmp_path / "rows.jsonl")
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(DatasetError, match=r"cannot read '.xlsx'"):
        read_preferences(tmp_path / "rows.xlsx")
    (tmp_path / "rows.jsonl").write_text('{"prompt": ')
    with pytest.raises(DatasetError, match="cannot be read as json"):
        read_preferences(tmp_path / "rows.jsonl")
    (tmp_path / "none.csv").write_text("")
    with pytest.raises(DatasetError, match=r"none\.csv is empty"):
        read_preferences(tmp_path / "none.csv")
