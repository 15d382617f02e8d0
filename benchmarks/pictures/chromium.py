"""The page of `finesteer ui` in a headless Chromium: for pictures and for its end-to-end test."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.ui.workbench import Workbench


ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# The last ones keep Chromium from calling home.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def executable() -> str | None:
    """The installed Chromium; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


def what_is_missing() -> str | None:
    """What has to be installed for the page in a browser; None if all is there."""
    for module, advice in (("gradio", "pip install .[ui]"), ("playwright", "pip install playwright")):
        try:
            __import__(module)
        except ModuleNotFoundError:
            return f"needs {module}: {advice}"
    return None if executable() else "needs Chromium, such as Debian's package chromium"


@contextlib.contextmanager
def served_playground() -> Iterator[tuple[Workbench, str]]:
    """The page on the playground with its two adapters: the workbench and the address."""
    from finesteer_hf.ui.page import build_page, launch

    model, tokenizer = playground.load()
    steered = SteeredModelForCausalLM.from_model(model)
    names = ("truthful", "safety")
    for name in names:
        steered.load_steering(str(ROOT / "hub_cards" / f"playground-{name}"), name)
    bench = Workbench(steered, tokenizer, "playground", own=names)
    page = build_page(bench)
    try:
        yield bench, launch(page)
    finally:
        page.close()
        bench.close()


@contextlib.contextmanager
def opened(address: str, *, dark: bool = False, height: int = 900) -> Iterator[Any]:
    """An address in a tab of 1200 pixels; leaving the block closes the browser.

    Args:
        address: what to open.
        dark: whether the system prefers dark pages.
        height: of the window, in pixels.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable(), args=ARGUMENTS)
        try:
            tab = browser.new_page(
                viewport={"width": 1200, "height": height}, color_scheme="dark" if dark else "light"
            )
            tab.goto(address)
            tab.wait_for_selector("#question textarea")
            yield tab
        finally:
            browser.close()


def ask(tab: Any, question: str) -> None:
    """Type a question, press Enter, and wait until the gate has been read."""
    tab.fill("#question textarea", question)
    tab.press("#question textarea", "Enter")
    tab.wait_for_selector("#gate circle")


def set_strength(tab: Any, steps: int) -> None:
    """Move the slider by steps of its keyboard, 0.05 each."""
    slider = tab.locator("#strength input[type=range]")
    slider.focus()
    for _ in range(abs(steps)):
        tab.keyboard.press("ArrowRight" if steps > 0 else "ArrowLeft")
