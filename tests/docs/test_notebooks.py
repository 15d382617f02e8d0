"""The notebooks of examples/ run as they stand, and what they show is what they print."""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import client_env
from hub_server import HubServer


nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (the extra `notebooks`)")
pytest.importorskip("nbclient", reason="nbclient is not installed (the extra `notebooks`)")

from benchmarks.pages.notebooks import EXAMPLES, ROOT, notebooks, run  # noqa: E402


NAMES = [path.stem for path in notebooks()]
# Packages of extras that a notebook needs.
NEEDS = {"lora_and_dpo": "trl", "quantised": "torchao"}
# Where the Makefile puts torchao: in the environment itself it would print at each start of the command line.
BESIDE = Path(sys.prefix) / "beside"
# Twenty seconds each; what they use has tests of its own.
SLOW = {"compare_methods", "lora_and_dpo"}
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]?\d+)?")


def printed(notebook: Any) -> list[str]:
    """What each code cell prints and returns, with figures masked: they differ in the last digits between processors."""
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
            shown.append(NUMBER.sub("#", "".join(texts)))
    return shown


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)
def test_it_runs_and_prints_what_it_shows(name: str, hub: HubServer, tmp_path: Path) -> None:
    beside = (BESIDE / NEEDS.get(name, "nothing")).is_dir()
    if name in NEEDS and not beside:
        pytest.importorskip(NEEDS[name], reason=f"the notebook needs {NEEDS[name]}")
    path = EXAMPLES / f"{name}.ipynb"
    work = tmp_path / "work"
    work.mkdir()
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(BESIDE)] if beside else [])]),
        **client_env(hub, tmp_path / "home"),
    }
    assert printed(run(path, work, env)) == printed(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_and_explains(name: str) -> None:
    path = EXAMPLES / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert len(kinds) < 15
    assert kinds[0] == "markdown" and notebook.cells[0].source.startswith("# ")
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")
    assert any(printed(notebook)), "no output is stored: python -m benchmarks.pages.notebooks"
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_path_of_a_machine(name: str) -> None:
    text = (EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/|site-packages|127\.0\.0\.1|localhost", text)


def test_each_has_a_line_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert NAMES and sorted(re.findall(r"\]\((\w+)\.ipynb\)", readme)) == NAMES
