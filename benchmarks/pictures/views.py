"""Draw the pictures of docs/views.md, from the adapters in hub_cards/ on the model that ships with the package.

python -m benchmarks.pictures.views        # half a minute; the page's screenshots need Chromium
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console

from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.method_api import DosePoint
from finesteer_hf.views.by_token import SteeredTokens, steering_by_token
from finesteer_hf.views.html import tokens_page
from finesteer_hf.views.plot_style import Drawn, png
from finesteer_hf.views.plots import (
    layer_figures,
    plot_dose_response,
    plot_gate_scores,
    plot_layer_screening,
    plot_tokens,
)
from finesteer_hf.views.terminal import TokensInTerminal


ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
CARDS = ROOT / "hub_cards"
STEERED, LEFT_ALONE = "Tell me something about goldfish.", "Say hello to the new neighbour."
COLUMNS = 80


def terminal(prompt: str, view: SteeredTokens) -> str:
    """What `finesteer look` prints, as SVG, with the fonts of whoever looks at it."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f'[bold green]$[/] finesteer look playground -s truthful \\\n    -p "{prompt}"', highlight=False)
    console.print(TokensInTerminal(view))
    svg = console.export_svg(title="finesteer look")
    # rich names fonts on a server; a picture may not fetch any.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def photograph(page: str, dark: bool, picture: Path) -> None:
    """A screenshot of a page in headless Chromium.

    Raises:
        SystemExit: if there is no Chromium.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("The screenshots need Chromium; install it, such as with `apt install chromium`.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page, encoding="utf-8")
        scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=760,250",
            *scheme,
        ]
        command = [browser, *options, f"--screenshot={picture}", file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def of_card(name: str) -> dict[str, Drawn]:
    """The plots of a shipped adapter's fit."""
    adapter = SteeringAdapter.from_pretrained(CARDS / name)
    report = adapter.config.fit["report"]
    scores = report["gate_scores"]
    points = [DosePoint.from_report(point) for point in report["dose_response"]]
    steered = {site.layer for site in adapter.build().writes}
    return {
        "layers": plot_layer_screening(layer_figures(report), chosen=steered),
        "gate": plot_gate_scores(scores["ir"], scores["general"], threshold=scores["threshold"]),
        "dose": plot_dose_response(points, chosen=adapter.config.strength, leads=report["objective"]["criterion"]),
    }


def main() -> None:
    _, tokenizer = playground.load()
    model = SteeredModelForCausalLM.from_pretrained("playground", steering=str(CARDS / "playground-truthful"))
    views = {
        prompt: steering_by_token(model, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens=24)
        for prompt in (STEERED, LEFT_ALONE)
    }
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "look.svg").write_text(terminal(STEERED, views[STEERED]), encoding="utf-8")
    for page in ("light", "dark"):
        photograph(tokens_page(views[STEERED]), page == "dark", IMAGES / f"tokens_page_{page}.png")
    plots = {"tokens": plot_tokens(views[STEERED]), **of_card("smollm2-truthful")}
    for name, plot in plots.items():
        (IMAGES / f"plot_{name}.png").write_bytes(png(plot.figure, dpi=90))
        print(f"{name}: {plot.alt}")
    print(f"{LEFT_ALONE} {views[LEFT_ALONE].describe()}")


if __name__ == "__main__":
    main()
