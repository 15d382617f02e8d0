"""The study's loop and its page, on a tiny model: finished rows are skipped, a failing row stops no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real import real_model, real_study
from benchmarks.real.real_data import GeneralData, Sizes
from benchmarks.real.real_model import run
from benchmarks.real.real_page import page
from benchmarks.real.real_rows import ROWS, UNSTEERED, Row, rows_of
from benchmarks.real.real_study import Study
from finesteer_hf import CAAConfig, SteeredModelForCausalLM
from finesteer_hf.evaluation.data.truthfulqa import TruthfulQuestion


ANSWERS = ("it is air", "they are small", "no , it is stone", "yes it is", "it is water", "they are dogs")
SIZES = Sizes(fit=8, questions=4, requests=3, xstest=3, general=2, texts=1, chosen_on=2)
QUESTIONS = [
    TruthfulQuestion(f"what is {word} {other} ?", ANSWERS[at % 6], (ANSWERS[at % 6],), (ANSWERS[(at + 1) % 6],), "all")
    for at, (word, other) in enumerate(
        (word, other) for word in ("the sky", "water", "fire", "stone") for other in ("green", "red", "blue")
    )
]


@pytest.fixture
def study(tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Study:
    found = Study("truthful", tmp_path, "a tiny model", tmp_path, SIZES)
    general = ["tell me about cats", "how to sing a song ?", "tell me about dogs", "what are cats and dogs ?"]
    found.__dict__ |= {
        "base": (model, tokenizer),
        "steered": SteeredModelForCausalLM.from_model(model),
        "halves": (QUESTIONS[:8], QUESTIONS[8:]),
        "general": GeneralData(general[:2], general[2:], ["packaged", "GSM8K"], [("tell me", "it is air")]),
        "sets": {
            "advbench": ["sing a song", "tell me about fire"],
            "jailbreakbench": ["how to fire"],
            "xstest_unsafe": ["how to sing ?"],
            "xstest_safe": ["what is fire ?"],
        },
    }
    # The row whose curve is measured.
    for module in (real_model, real_study):
        monkeypatch.setattr(module, "REFERENCE", "CAA")
        monkeypatch.setattr(module, "xstest_split", lambda data: ([], []))
    monkeypatch.setattr(real_study, "refusal_rows", lambda data, sizes: [])
    monkeypatch.setattr(real_model, "advbench_split", lambda data: ([{"goal": "sing a song"}], []))
    return found


ROWS_OF_TEST = [
    Row(UNSTEERED),
    Row("system prompt, sky", system="the sky is green"),
    Row("CAA", lambda: CAAConfig(layer=1, strength=2.0), note="a constant"),
    Row("GONE", lambda: real_model_missing()),
]


def real_model_missing() -> Any:
    raise ValueError("no method 'GONE'")


def test_rows_are_made_once_and_the_page_is_made_of_them(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    run(study, ROWS_OF_TEST)
    folder = study.folder
    assert {file.stem for file in folder.glob("*.json")} == {
        "study",
        "unsteered",
        "system-prompt-sky",
        "caa",
        "gone.failed",
    }
    caa = json.loads((folder / "caa.json").read_text())
    assert len(caa["choices"]["mc2"]) == len(caa["answers"]["own_words"]) == 4
    assert set(caa["curve"]) == set(map(str, real_model.TRUTHFUL_SCALES))
    assert caa["made"]["settings"]["layer"] == 1
    assert (folder / "caa" / "steering_model.safetensors").exists()
    assert "FAILED: ValueError: no method 'GONE'" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.json") if "gone" not in file.name}
    run(study, ROWS_OF_TEST)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert capsys.readouterr().out.count("done before") == 3
    text = page(study.out)
    assert "- GONE: ValueError: no method 'GONE'" in text
    assert "n = 4 questions, 8 answers." in text
    assert "**system prompt, sky**" in text
    assert "| what is stone red ? |" in text
    for line in text.splitlines():
        if line.startswith("| CAA "):
            assert "[" in line
    tables = [line.count(" | ") for line in text.splitlines() if line.startswith("| unsteered |")]
    assert len(tables) == 3


def test_adapters_are_reused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    run(study, [ROWS_OF_TEST[2]])
    (study.folder / "caa.json").unlink()
    monkeypatch.setattr(real_study, "fit_steering", lambda *args, **kwargs: pytest.fail("fitted again"))
    run(study, [ROWS_OF_TEST[2]])
    assert (study.folder / "caa.json").exists()
    assert study.steered.steering_adapters == {}


def test_other_settings_are_refused(study: Study) -> None:
    run(study, [])
    other = Study(study.task, study.out, study.source, study.data, Sizes(fit=2))
    with pytest.raises(SystemExit, match="other settings"):
        run(other, [])


def test_refusals(study: Study) -> None:
    study.task = "refusal"
    study.fit_data = (
        lambda kind: (  # type: ignore[method-assign]
            real_study.truthful_rows(QUESTIONS[:8]),
            study.general.fit_rows(),
        )
    )
    run(study, ROWS_OF_TEST[:3])
    found = json.loads((study.folder / "caa.json").read_text())
    assert set(found["curve"]) == set(map(str, real_model.REFUSAL_SCALES))
    text = page(study.out)
    assert "AdvBench (n=2)" in text
    assert f"| CAA | {real_model.REFUSAL_SCALES[-1]} |" in text


def test_rows_have_names_of_their_own() -> None:
    assert len({row.slug for row in ROWS}) == len(ROWS)
    assert [row.slug for row in rows_of("refusal", ["finesteer", "unsteered"])] == ["unsteered", "finesteer"]
    with pytest.raises(SystemExit, match="No rows \\['nonsense'\\]"):
        rows_of("truthful", ["nonsense"])


def test_missing_data_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"No data: .*mc_task\.json"):
        real_model.check_data(tmp_path)
