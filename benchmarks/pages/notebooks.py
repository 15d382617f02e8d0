"""Run the notebooks of examples/ and write their outputs into them.

python -m benchmarks.pages.notebooks                     # all; about two minutes on two cores
python -m benchmarks.pages.notebooks quickstart          # some

Each runs in a kernel of its own, in an empty folder, on the playground. The tests' Hub, on 127.0.0.1, takes what is pushed.
Of the outputs, stdout, values and pictures are kept; stderr (progress, warnings) is dropped, since it names paths.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def notebooks() -> list[Path]:
    """The notebooks, by name."""
    return sorted(EXAMPLES.glob("*.ipynb"))


def run(path: Path, folder: Path, env: Mapping[str, str], timeout: int = 240) -> NotebookNode:
    """Run a notebook and return it with its new outputs.

    Args:
        path: the notebook, which is not changed.
        folder: its working folder.
        env: the kernel's whole environment.
        timeout: most seconds for one cell.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=dict(env))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(KERNEL)
    return notebook


def main() -> None:
    """The command line."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_fixtures import client_env
    from hub_server import HubServer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of notebooks; all if none is given")
    names = parser.parse_args().names
    known = {path.stem: path for path in notebooks()}
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"No notebook {unknown}; there are {list(known)}.")
    for name in names or known:
        start = time.perf_counter()
        with HubServer() as hub, tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary) / "work"
            work.mkdir()
            env = {**os.environ, "PYTHONPATH": str(ROOT), **client_env(hub, Path(temporary) / "home")}
            notebook = run(known[name], work, env)
        nbformat.write(notebook, known[name])
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
