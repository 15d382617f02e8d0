"""Draw docs/images/demo.svg: what `finesteer demo` prints, shortened, as it looks in a terminal.

python benchmarks/pictures/terminal.py --run       # runs the demo first: some minutes on two cores
python benchmarks/pictures/terminal.py             # draws what the last run printed
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


ROOT = Path(__file__).resolve().parents[2]
PRINTED = ROOT / "out" / "demo_screen" / "stdout.ansi"
PICTURE = ROOT / "docs" / "images" / "demo.svg"
COLUMNS = 100


def record() -> None:
    """Run the demo on the model that ships with the package, offline, and keep what it prints, colours included."""
    PRINTED.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "finesteer_hf", "demo", "--out", "demo"]
    done = subprocess.run(command, cwd=PRINTED.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    PRINTED.write_text(done.stdout, encoding="utf-8")


def shortened(printed: str) -> list[Text]:
    """The table of what was won and lost, and the answers to three held-out questions.

    Raises:
        ValueError: if the demo no longer prints them.
    """
    lines = [Text.from_ansi(line) for line in printed.splitlines()]
    plain = [line.plain.strip() for line in lines]
    start = plain.index("won and lost")
    end = next(number for number in range(start, len(plain)) if plain[number].startswith("└")) + 1
    first = next(number for number in range(end, len(plain)) if plain[number].startswith("unsteered:")) - 1
    last = next(number for number in range(first, len(plain)) if plain[number].startswith("refusals")) - 1
    return [*lines[start:end], Text("..."), *lines[first:last], Text("...")]


def draw(printed: str) -> str:
    """The terminal as SVG, with the fonts of whoever looks at it."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor")
    console.print("[bold green]$[/] finesteer demo", highlight=False)
    for line in shortened(printed):
        console.print(line)
    svg = console.export_svg(title="finesteer demo")
    # rich names fonts on a server; a picture in a README may not fetch any.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the demo first")
    if parser.parse_args().run:
        record()
    if not PRINTED.is_file():
        raise SystemExit("there is no run to draw: give --run")
    PICTURE.write_text(draw(PRINTED.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
