"""Write docs/architectures.md: what steering does on every causal-LM architecture of the installed transformers.

python -m benchmarks.pages.architecture_table            # all, about ten minutes on one core
python -m benchmarks.pages.architecture_table --only LlamaForCausalLM MambaForCausalLM --out /dev/stdout
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

from finesteer_hf.testing.architecture_checks import CHECKS
from finesteer_hf.testing.architectures import ArchitectureReport, run_architecture
from finesteer_hf.testing.tiny_models import architectures


OUT = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """# Architectures

Every class of transformers' causal-LM and image-text-to-text mappings, made tiny and given random weights, steered and
compared with plain forward hooks. transformers {version}, torch {torch}: **{conforming} of {total} conform**, {refused}
are refused with an `UnsupportedModelError`, {not_run} do not run as text models, {failing} fail.

Written by `python -m benchmarks.pages.architecture_table`; the tests in `tests/architectures` hold each row to what is
written.

A refused model is left as it was: nothing is steered by halves.

## What is checked

| check | what must hold |
|---|---|
| blocks | a forward passes the blocks in order, each once, and each takes what the one before returned |
| greedy | a batch equals a plain hook on `resid_post[1]`, to the bit, and differs from unsteered |
| resid_pre, head_out, mlp_act | the same at a block's input, and at its attention's and feed-forward's last projections' |
| left padding | a padded batch equals a hook that spares pads, to the bit; its rows equal the rows alone |
| beams | `num_beams=3, num_return_sequences=2` equals the hook, to the bit |
| no cache | `use_cache=False` equals the hook, to the bit, and the answer with a cache |
| query gate | a vector and a gate that depend on the query equal two plain hooks; rows equal the rows alone |
| status | a loaded adapter shows its sites and steers; `steering=None` is the base, to the bit |
| unload | class, attributes, hooks, `state_dict` keys, config and outputs are as before, to the bit |

Tests of single features (static caches, assisted decoding, guidance, threads, compiling, ...) run on Llama and others in
`tests/runtime` and `tests/conformance`.

## Conforming

`yes` is a check that holds. A letter is a check that holds as far as the unsteered model goes:

{notes}

| class | model types | blocks | {checks} |
|---|---|---|{bars}
"""


def table(reports: list[ArchitectureReport]) -> str:
    """The page for a list of reports."""
    types = architectures()
    by_verdict = {v: [r for r in reports if r.verdict == v] for v in ("conforms", "refused", "not run", "fails")}
    checks = [*CHECKS, "unload"]
    letters: dict[str, str] = {}
    rows = []
    for report in by_verdict["conforms"]:
        cells = []
        for check in checks:
            note = report.checks[check]
            cells.append(letters.setdefault(note, chr(ord("a") + len(letters))) if note else "yes")
        rows.append(f"| {report.name} | {', '.join(types[report.name])} | {report.blocks} | {' | '.join(cells)} |")
    page = HEAD.format(
        version=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        conforming=len(by_verdict["conforms"]),
        total=len(reports),
        refused=len(by_verdict["refused"]),
        not_run=len(by_verdict["not run"]),
        failing=len(by_verdict["fails"]),
        notes="\n".join(f"- {letter}: {note}" for note, letter in letters.items()),
        checks=" | ".join(checks),
        bars="---|" * len(checks),
    )
    page += "\n".join(rows) + "\n"
    for verdict, title in (("refused", "Refused"), ("not run", "Not run"), ("fails", "Failing")):
        if by_verdict[verdict]:
            page += f"\n## {title}\n\n| class | model types | why |\n|---|---|---|\n"
            for report in by_verdict[verdict]:
                reason = report.reason.replace("|", "\\|")
                page += f"| {report.name} | {', '.join(types[report.name])} | {reason} |\n"
    return page


def main() -> None:
    """Run the checks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(architectures()), metavar="CLASS", help="classes to run")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    reports = []
    for number, name in enumerate(arguments.only, 1):
        reports.append(run_architecture(name))
        print(f"{number}/{len(arguments.only)} {name}: {reports[-1].verdict} {reports[-1].reason}", file=sys.stderr)
    arguments.out.write_text(table(reports), encoding="utf-8")


if __name__ == "__main__":
    main()
