"""The page end to end, in a headless Chromium: what a visitor types, moves, reads and downloads."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pictures.chromium import ask, opened, served_playground, set_strength, what_is_missing
from finesteer_hf.ui.own_fit import example_pairs
from finesteer_hf.ui.workbench import Workbench


MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
ASKED = "Tell me something about shaved hair."
# Texts of both answers, every 5 ms.
WATCH = """() => { window.seen = []; window.watch = setInterval(() => window.seen.push(
  ['#unsteered', '#steered'].map(id => document.querySelector(id + ' textarea').value)), 5); }"""


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Workbench, str]]:
    with served_playground() as page:
        yield page


@pytest.fixture
def tab(served: tuple[Workbench, str]) -> Iterator[Any]:
    with opened(served[1]) as page:
        page.set_default_timeout(60_000)
        yield page


def answers(tab: Any) -> tuple[str, str]:
    return tab.input_value("#unsteered textarea").strip(), tab.input_value("#steered textarea").strip()


def wait_for(tab: Any, condition: str) -> None:
    """Wait for a condition on `u` and `s`, the texts of both answers."""
    tab.wait_for_function(
        f"""() => {{ const [u, s] = ['#unsteered', '#steered'].map(
        id => document.querySelector(id + ' textarea').value.trim()); return {condition}; }}"""
    )


def test_ask_move_the_slider_and_see_the_answer_change(tab: Any) -> None:
    tab.evaluate(WATCH)
    ask(tab, ASKED)
    wait_for(tab, "u.endsWith('.') && s.endsWith('.')")
    unsteered, steered = answers(tab)
    assert unsteered and steered and unsteered != steered
    seen = tab.evaluate("() => { clearInterval(window.watch); return window.seen; }")
    assert any(0 < len(u) < len(unsteered) and 0 < len(s) < len(steered) for u, s in seen)
    assert "open: score" in tab.inner_text("#gate") and "threshold" in tab.inner_text("#gate")
    assert tab.locator("#experts .fs-bar").count() == 4
    tab.wait_for_selector("#by-token >> text=Steering acted on")

    set_strength(tab, 20)
    assert tab.locator("#strength input[type=range]").input_value() == "2"
    wait_for(tab, f"s !== {steered!r} && s.length > 100")
    assert answers(tab)[0] == unsteered
    tab.locator("#strength input[type=range]").focus()
    tab.keyboard.press("Home")
    tab.wait_for_selector("#gate >> text=At strength 0")
    assert answers(tab) == (unsteered, unsteered)


def test_nothing_comes_from_elsewhere(served: tuple[Workbench, str], tab: Any) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.reload()
    tab.wait_for_selector("#question textarea")
    ask(tab, ASKED)
    assert len(asked) > 10
    assert not [url for url in asked if not url.startswith((served[1], "data:", "blob:"))]


def test_the_gate_stays_shut_for_other_questions(tab: Any) -> None:
    ask(tab, "What is 3 plus 4?")
    tab.wait_for_selector("#gate >> text=shut")
    wait_for(tab, "u.endsWith('.') && s.endsWith('.')")
    assert answers(tab)[0] == answers(tab)[1] != ""
    assert "not added" in tab.inner_text("#experts")
    tab.wait_for_selector("#by-token >> text=Steering added nothing")


def test_another_adapter_answers_the_same_question(tab: Any) -> None:
    ask(tab, ASKED)
    wait_for(tab, "u.endsWith('.') && s.endsWith('.') && u !== s")
    tab.click("#adapter input")
    tab.click("[role=option] >> text=safety")
    tab.wait_for_selector("#experts >> text=one map")
    tab.wait_for_selector("#gate >> text=shut")
    wait_for(tab, "u.endsWith('.') && u === s")


def test_mistakes_are_explained(tab: Any) -> None:
    tab.press("#question textarea", "Enter")
    tab.wait_for_selector("text=Type a question first")
    tab.click("role=tab[name='Load an adapter']")
    tab.fill("#source input", "nowhere at all")
    tab.click("#load")
    tab.wait_for_selector("text=it is not a Hub id")
    tab.click("role=tab[name='Fit your own']")
    tab.click("#fit")
    tab.wait_for_selector("#fitted >> text=There are no pairs yet")
    tab.fill("#pairs textarea", "a, b, c\na, b")
    tab.click("#fit")
    tab.wait_for_selector("#fitted >> text=Line 2 has 2 parts")


def test_load_an_adapter_and_ask_it(tab: Any) -> None:
    tab.click("role=tab[name='Load an adapter']")
    tab.fill("#source input", str(Path(__file__).resolve().parents[2] / "hub_cards" / "playground-truthful"))
    tab.click("#load")
    tab.wait_for_selector("#loaded >> text=Loaded playground-truthful")
    tab.click("role=tab[name='Ask']")
    assert tab.input_value("#adapter input").startswith("playground-truthful")
    tab.wait_for_selector("#gate svg")
    ask(tab, ASKED)
    wait_for(tab, "u.endsWith('.') && s.endsWith('.') && u !== s")


def test_fit_your_own_ask_it_and_take_it_home(served: tuple[Workbench, str], tab: Any, tmp_path: Path) -> None:
    tab.click("role=tab[name='Fit your own']")
    tab.fill("#pairs textarea", "\n".join(example_pairs(served[0]).splitlines()[:13]))
    tab.fill("#own-name textarea, #own-name input", "home")
    tab.click("#method input")
    tab.click("[role=option] >> text=CAA")
    tab.click("#fit")
    tab.wait_for_selector("#progress >> text=reading states")
    tab.wait_for_selector("#fitted >> text=Fitted home on 12 pairs")
    with tab.expect_download() as download:
        tab.click("#download")
    download.value.save_as(tmp_path / "home.zip")
    with zipfile.ZipFile(tmp_path / "home.zip") as archive:
        assert {"home/steering_config.json", "home/steering_model.safetensors"} <= set(archive.namelist())
    tab.click("role=tab[name='Ask']")
    assert tab.input_value("#adapter input") == "home"
    tab.wait_for_selector("#gate >> text=No gate")
    tab.fill("#question textarea", ASKED)
    tab.press("#question textarea", "Enter")
    wait_for(tab, "u.endsWith('.') && s.length > 0")
    assert "No gate" in tab.inner_text("#gate")


def test_stop_ends_a_fit(served: tuple[Workbench, str], tab: Any) -> None:
    bench = served[0]
    before = set(bench.model.steering_adapters)
    tab.click("role=tab[name='Fit your own']")
    tab.click("#fill")
    tab.wait_for_function("document.querySelector('#pairs textarea').value.length > 1000")
    tab.click("#fit")
    tab.wait_for_selector("#progress >> text=reading states")
    tab.click("#stop-fit")
    tab.wait_for_selector("#fitted >> text=Stopped")
    assert bench.lock.acquire(timeout=60)
    bench.lock.release()
    assert set(bench.model.steering_adapters) == before
