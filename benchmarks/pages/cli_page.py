"""Write docs/cli.md: every command with its screens, 80 columns wide, as they are printed.

python -m benchmarks.pages.cli_page                      # about two minutes on one core
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from finesteer_hf.cli.asking.slash import HELP
from finesteer_hf.cli.commands import app
from finesteer_hf.evaluation.data.playground_eval import fit_rows


sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from hub_fixtures import client_of
from hub_server import HubServer


OUT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
COLUMNS = 80
HEAD = """# The command line

`finesteer` fits, uses, evaluates and compares steering adapters from a shell; `python -m finesteer_hf` is the same. Written
by `python -m benchmarks.pages.cli_page` from what the commands print; a test checks that it names each command and option.

* **Results go to stdout**, progress and warnings to stderr: `finesteer show ADAPTER --json | jq .strength` works. Every
  command has `--json`; `generate` and `chat` write an object a line.
* **Exit codes**: 0; 1 for an error, with one line that says what is wrong and, where more is known, a hint; 2 for a wrong
  option; 130 after ctrl-C. `--debug` shows the traceback of an error.
* **Ctrl-C** leaves a fit resumable: the states that it captures are in `OUT.states` (or `--store-dir`) until it is done,
  and the same command continues from them. The folder is removed at the end; a `--store-dir` of your own is kept.
* **Completion** of commands and options: `finesteer --install-completion`.
* **Options are parameters** of the Python functions: those of `fit` and `compare` are `fit_steering`'s. A new parameter
  becomes an option by itself. `none` is Python's None where an option allows it.
* **A model** is a Hub id, a folder, or `playground`, the small one that ships with the package. `--dtype`, `--device`,
  `--device-map`, `--quantization` (bitsandbytes, 4 or 8 bits) and `--revision` say how it is loaded; `--model-arg
  name=value` passes anything else to transformers, such as `--model-arg attn_implementation=sdpa`.
* **`--set name=value`** sets a setting of the method (`finesteer methods NAME` lists them). Values are JSON, or else text.
  Fields that a fit writes (`hidden_size`, `lora`, ...) are not settings and are refused by name.

`finesteer doctor` is the place to start when something does not work: paste what it prints into a bug report.

The screens below were printed on the playground, with `rows.jsonl` 120 of its questions, `{"prompt", "chosen",
"rejected"}` a line.
"""
ASKED = (
    {"id": 1, "prompt": "Is it true that bats are blind?"},
    {"id": 2, "messages": [{"role": "user", "content": "Say hello to the new neighbour."}]},
)
# For each command what is run; the folder that `fit` makes serves the ones after it.
FIXED = "--set layer=2 --set experts=reduced_rank --set refine=0"
TRUTHFUL = "--steering truthful"
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
        f"finesteer generate playground {TRUTHFUL} --input asked.jsonl",
    ),
    "chat": (f"finesteer chat playground {TRUTHFUL}",),
    "look": ('finesteer look playground --steering truthful --prompt "Is it true that bats are blind?"',),
    "serve": (),
    "eval": ("finesteer eval playground --steering truthful --benchmark playground --limit 40 --update-card",),
    "compare": (
        "finesteer compare playground --data rows.jsonl --methods FINESTEER,CAA --set CAA.layer=2 "
        "--set FINESTEER.layer=2 --set FINESTEER.experts=reduced_rank --set FINESTEER.refine=0 --out compared",
    ),
    "show": ("finesteer show compared/adapters/CAA",),
    "push": ("finesteer push truthful org/playground-truthful --tag v1",),
    "pull": ("finesteer pull org/playground-truthful@v1",),
    "list": ("finesteer list", "finesteer list truthful --hub"),
    "convert": (
        "finesteer convert compared/adapters/CAA caa.gguf --positions all",
        "finesteer convert caa.gguf from_gguf",
        "finesteer convert compared/adapters/CAA for_vllm --to vllm",
    ),
    "doctor": (f"finesteer doctor playground {TRUTHFUL}",),
    "demo": (),
    "ui": (),
}


# What is typed into a chat, a line at a time.
CHAT = (
    "/help",
    "Is it true that bats are blind?",
    "/reset",
    "/compare",
    "Is it true that bats are blind?",
    "/reset",
    "/scale 0.5",
    "Say hello to the new neighbour.",
    "/adapters",
    "/quit",
)
# What is only of the machine that wrote the page: shown as "..." in tables, and the stand-in for the Hub as the Hub.
OF_MACHINE = re.compile(r"(?<=│)((?:cpu|hub|signed in|hub cache) +│ )(.*?)(?= *│$)", re.MULTILINE)
STAND_IN = re.compile(r"http://127\.0\.0\.1:\d+")


def screen(runner: CliRunner, line: str) -> str:
    """A command line and what it prints to stdout; of a chat also what is typed, and what it says on stderr.

    Raises:
        RuntimeError: if it fails.
    """
    chat = line.startswith("finesteer chat") and "--help" not in line
    done = runner.invoke(
        app, shlex.split(line)[1:], prog_name="finesteer", input="\n".join(CHAT) + "\n" if chat else None
    )
    if done.exit_code != 0:
        raise RuntimeError(f"{line}: {done.output}")
    printed = typed_in(done.output) if chat else done.stdout
    printed = OF_MACHINE.sub(lambda found: found[1] + "...".ljust(len(found[2])), printed)
    printed = STAND_IN.sub("https://huggingface.co", printed)
    # A terminal breaks longer lines, such as JSON, at its last column.
    lines = (each.rstrip() for each in printed.strip("\n").splitlines())
    text = "\n".join(each[at : at + COLUMNS] for each in lines for at in range(0, max(len(each), 1), COLUMNS))
    return f"```console\n$ {wrapped(line)}\n{text}\n```\n"


def typed_in(output: str) -> str:
    """What a chat printed, with each line that was typed before what it led to, as a terminal shows them."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("Loading")]
    shown, rest = lines[:1], iter(lines[1:])
    compare = False
    for typed in CHAT:
        shown.append(f"> {typed}")
        if typed == "/quit":
            break
        compare = compare or typed == "/compare"
        # Below each answer is one remark; a slash command says one line, or a table.
        remarks = 2 if compare and not typed.startswith("/") else len(HELP) if typed == "/help" else 1
        while remarks:
            line = next(rest)
            shown.append(line)
            said = typed.startswith("/") if typed != "/adapters" else line.startswith("└")
            remarks -= bool(said or re.search(r"; \d+ tokens, ", line) or line.startswith("unsteered; "))
    return "\n".join(shown)


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
        Path("asked.jsonl").write_text("\n".join(map(json.dumps, ASKED)) + "\n", encoding="utf-8")
        # A Hub on this machine stands in for the real one.
        with HubServer() as hub, client_of(hub, Path(folder) / "home"):
            out.write_text(page(CliRunner(env={"COLUMNS": str(COLUMNS)})), encoding="utf-8")
        os.chdir(out.parent)


if __name__ == "__main__":
    main()
