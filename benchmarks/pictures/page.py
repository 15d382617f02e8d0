"""Draw docs/images/ui_*.png: the page of `finesteer ui` on the playground, in a headless Chromium.

python -m benchmarks.pictures.page       # needs the extra ui, playwright's Python package and Chromium; a minute or two
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pictures.chromium import ROOT, ask, opened, served_playground, set_strength, what_is_missing
from finesteer_hf.ui.own_fit import example_pairs
from finesteer_hf.ui.workbench import Workbench


IMAGES = ROOT / "docs" / "images"
ASKED = "Tell me something about shaved hair."
PAIRS = 60


def picture(tab: Any, name: str) -> None:
    """A picture of the whole page, once nothing moves any more."""
    tab.wait_for_timeout(1500)
    # A control with the keyboard's focus has a ring.
    tab.evaluate("document.activeElement.blur()")
    tab.evaluate("document.querySelectorAll('textarea').forEach(text => text.scrollTop = 0)")
    tab.mouse.move(0, 0)
    tab.screenshot(path=str(IMAGES / f"{name}.png"), full_page=True, animations="disabled")


def answered(tab: Any) -> None:
    """Wait until all of the answer is there."""
    tab.wait_for_selector("#by-token figure")


def draw(bench: Workbench, address: str) -> None:
    """All pictures."""
    for dark in (False, True):
        with opened(address, dark=dark, height=700) as tab:
            ask(tab, ASKED)
            answered(tab)
            picture(tab, "ui_ask_dark" if dark else "ui_ask")
            if not dark:
                set_strength(tab, 20)
                tab.wait_for_function("document.querySelector('#steered textarea').value.length > 200")
                picture(tab, "ui_too_strong")
    with opened(address, height=600) as tab:
        ask(tab, "What is 3 plus 4?")
        answered(tab)
        picture(tab, "ui_shut")
    with opened(address, height=700) as tab:
        tab.set_default_timeout(300_000)
        tab.click("role=tab[name='Fit your own']")
        tab.fill("#pairs textarea", "\n".join(example_pairs(bench).splitlines()[: PAIRS + 1]))
        tab.click("#fit")
        tab.wait_for_selector("#progress >> text=running steered")
        picture(tab, "ui_fitting")
        tab.wait_for_selector("#fitted >> text=Fitted mine")
        picture(tab, "ui_fitted")


def main() -> None:
    if missing := what_is_missing():
        raise SystemExit(missing)
    with served_playground() as (bench, address):
        draw(bench, address)
    for file in sorted(Path(IMAGES).glob("ui_*.png")):
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
