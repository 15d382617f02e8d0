"""`finesteer look`: the terminal's view, the page, JSON, and errors before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from finesteer_hf.cli.commands import app
from finesteer_hf.sites import Site
from finesteer_hf.testing.probe import probe_adapter
from finesteer_hf.testing.toy import toy_model, toy_tokenizer
from finesteer_hf.views.by_token import steering_by_token


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("look")
    model = toy_model()
    model.save_pretrained(folder / "base")
    toy_tokenizer().save_pretrained(folder / "base")
    adapter = probe_adapter(Site("resid_post", 0), Site("resid_post", 1), model.model.embed_tokens.weight[7].detach())
    adapter.save_pretrained(folder / "steering")
    return str(folder / "base"), str(folder / "steering")


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["look", *arguments])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def test_look_shows_the_tokens_and_writes_the_page(folders: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = folders
    page = tmp_path / "new" / "view.html"
    shown = run(base, "-s", adapter, "-p", "sun1 sea2", "--max-new-tokens", "3", "--html", str(page))
    assert "sun1 sea2" in shown and "█" in shown and "default: gate 1.000" in shown and "resid_post[1]" in shown
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "share" in text and "sun1" in text


def test_json_has_what_the_function_returns(folders: tuple[str, str]) -> None:
    from finesteer_hf import SteeredModelForCausalLM

    base, adapter = folders
    said = run(base, "-s", adapter, "-p", "sun1 sea2", "--plain", "--answer", "oak3", "--scale", "2", "--json")
    model = SteeredModelForCausalLM.from_pretrained(base, steering=adapter)
    seen = steering_by_token(model, toy_tokenizer(), "sun1 sea2", answer=" oak3", steering_scale=2.0)
    assert json.loads(said) == json.loads(json.dumps(seen.to_dict()))
    assert [token["part"] for token in json.loads(said)["tokens"]] == ["prompt", "prompt", "answer"]


def test_what_cannot_work_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    assert "Give --steering" in run("nowhere", "-p", "hello", code=1)
    assert "--system needs" in run("nowhere", "-s", "x", "-p", "hello", "--plain", "--system", "be", code=1)
    assert "is a folder" in " ".join(run("nowhere", "-s", "x", "-p", "hello", "--html", str(tmp_path), code=1).split())
