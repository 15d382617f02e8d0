"""Write docs/cli.md: every command with its screens, 80 columns wide, as they are printed.

python -m benchmarks.pages.cli_page                      # about two minutes on one core
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from finesteer_hf.cli.commands import app
from finesteer_hf.evaluation.data.playground_eval import fit_rows


OUT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
COLUMNS = 80
HEAD = """# The command line

`finesteer` fits, uses, evaluates and compares steering adapters from a shell; `python -m finesteer_hf` is the same. Written
by `python -m benchmarks.pages.cli_page` from what the commands print; a test checks that it names each command and option.

* **Results go to stdout**, progress and warnings to stderr: `finesteer show ADAPTER --json | jq .strength` works.
* **Exit codes**: 0; 1 for an error that a user can fix, with a message; 2 for a wrong option; 130 after ctrl-C.
* **Options are parameters** of the Python functions: those of `fit` and `compare` are `fit_steering`'s. A new parameter
  becomes an option by itself. `none` is Python's None where an option allows it.
* **A model** is a Hub id, a folder, or `playground`, the small one that ships with the package. `--dtype`, `--device`,
  `--device-map`, `--quantization` (bitsandbytes, 4 or 8 bits) and `--revision` say how it is loaded; `--model-arg
  name=value` passes anything else to transformers, such as `--model-arg attn_implementation=sdpa`.
* **`--set name=value`** sets a setting of the method (`finesteer methods NAME` lists them). Values are JSON, or else text.
  Fields that a fit writes (`hidden_size`, `lora`, ...) are not settings and are refused by name.

The screens below were printed on the playground, with `rows.jsonl` 120 of its questions, `{"prompt", "chosen",
"rejected"}` a line.
"""
# For each command what is run; the folder that `fit` makes serves the ones after it.
FIXED = "--set layer=2 --set experts=reduced_rank --set refine=0"
RUNS: dict[str, tuple[str, ...]] = {
    "methods": ("finesteer methods", "finesteer methods CAA"),
    "fit": (
        f"finesteer fit playground rows.jsonl --out truthful --split group {FIXED} "
        '--about "True answers to questions that the model answers with folklore" '
        '--example "Do goldfish forget everything within three seconds?"',
    ),
    "generate": (
        'finesteer generate playground --steering truthful --prompt "Is it true that bats are blind?" '
        '--prompt "Say hello to the new neighbour."',
    ),
    "look": ('finesteer look playground --steering truthful --prompt "Is it true that bats are blind?"',),
    "eval": ("finesteer eval playground --steering truthful --benchmark playground --limit 40 --update-card",),
    "compare": (
        "finesteer compare playground --data rows.jsonl --methods FINESTEER,CAA --set CAA.layer=2 "
        "--set FINESTEER.layer=2 --set FINESTEER.experts=reduced_rank --set FINESTEER.refine=0 --out compared",
    ),
    "show": ("finesteer show compared/adapters/CAA",),
    "demo": (),
    "ui": (),
}


def screen(runner: CliRunner, line: str) -> str:
    """A command line and what it prints to stdout.

    Raises:
        RuntimeError: if it fails.
    """
    done = runner.invoke(app, shlex.split(line)[1:], prog_name="finesteer")
    if done.exit_code != 0:
        raise RuntimeError(f"{line}: {done.output}")
    shown = "\n".join(text.rstrip() for text in done.stdout.strip("\n").splitlines())
    return f"```console\n$ {wrapped(line)}\n{shown}\n```\n"


def wrapped(line: str) -> str:
    """A command line on several lines of at most `COLUMNS` characters, as a shell reads it."""
    lines, current = [], ""
    for word in shlex.split(line):
        word = shlex.quote(word) if " " not in word else f'"{word}"'
        # Two for the prompt or the indent, two for the backslash.
        if current and len(current) + len(word) + 5 > COLUMNS:
            lines.append(current)
            current = word
        else:
            current = f"{current} {word}".strip()
    return " \\\n  ".join([*lines, current])


def page(runner: CliRunner) -> str:
    """The whole page; commands run in the working folder."""
    parts = [HEAD, screen(runner, "finesteer --help")]
    for name, runs in RUNS.items():
        parts.append(f"## finesteer {name}\n")
        parts.append(screen(runner, f"finesteer {name} --help"))
        parts += [screen(runner, line) for line in runs]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out.resolve()
    missing = set(get_command(app).commands) ^ set(RUNS)  # type: ignore[attr-defined]
    if missing:
        raise SystemExit(f"RUNS and the commands differ: {sorted(missing)}")
    rows = fit_rows("truthful", split="question", limit=120, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        out.write_text(page(CliRunner(env={"COLUMNS": str(COLUMNS)})), encoding="utf-8")
        os.chdir(out.parent)


if __name__ == "__main__":
    main()
