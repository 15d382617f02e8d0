"""Imports point down, inside functions too; no folder has too many files, and no file is too long."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import finesteer_hf


PACKAGE = Path(finesteer_hf.__file__).parent
# From the ground up; what stands on one line may import one another.
LAYERS = [
    ["errors"],
    ["estimators"],
    ["decoder_layout", "model_head"],
    ["sites"],
    ["processors"],
    ["adapters", "method_api"],
    ["runtime"],
    ["serving"],
    ["model"],
    ["custom_generate"],
    ["methods"],
    ["playground"],
    ["fitting"],
    ["evaluation"],
    ["views"],
    ["hub"],
    ["interop"],
    ["testing"],
    ["cli", "ui"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MOST_FILES, MOST_LINES = 15, 350
REPO = Path(__file__).parents[2]
ROOTS = [PACKAGE, REPO / "tests", REPO / "benchmarks"]


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere but for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "finesteer_hf":
            yield from (f"finesteer_hf.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        yield from imported(node)


@pytest.mark.parametrize("layer", HEIGHT)
def test_a_layer_imports_none_above_it(layer: str) -> None:
    files = (
        [PACKAGE / f"{layer}.py"] if (PACKAGE / f"{layer}.py").exists() else sorted((PACKAGE / layer).rglob("*.py"))
    )
    assert files
    upward = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if name.startswith("finesteer_hf.") and HEIGHT.get(name.split(".")[1], -1) > HEIGHT[layer]
    ]
    assert not upward, upward


def test_every_module_has_its_layer() -> None:
    own = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert own - {"__init__", "__main__"} == set(HEIGHT)


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.name)
def test_no_folder_has_too_many_files(root: Path) -> None:
    counts = Counter(str(file.parent.relative_to(root.parent)) for file in root.rglob("*.py"))
    assert counts and max(counts.values()) <= MOST_FILES, counts.most_common(3)


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.name)
def test_no_file_is_too_long(root: Path) -> None:
    lines = {str(f.relative_to(root.parent)): len(f.read_text("utf-8").splitlines()) for f in root.rglob("*.py")}
    assert lines and not {file: count for file, count in lines.items() if count > MOST_LINES}


def test_no_two_test_files_share_a_name() -> None:
    # pytest imports them by their names alone, and would refuse the second.
    names = [path.name for root in ("tests", "integrations") for path in (REPO / root).rglob("test_*.py")]
    assert names and not {name for name in names if names.count(name) > 1}
