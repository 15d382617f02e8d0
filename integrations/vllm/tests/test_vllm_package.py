"""The plugin is a package of its own."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

import pytest


if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python before 3.11 reads TOML with tomli, which is not installed")

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = sorted((PACKAGE / "src" / "finesteer_vllm").glob("*.py"))


def test_it_imports_torch_and_safetensors_and_nothing_else() -> None:
    """A server has no finesteer_hf, and vLLM is looked up by name, so that the seams are checked first."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    assert found - sys.stdlib_module_names == {"torch", "safetensors", "finesteer_vllm"}


def test_the_entry_point_is_there(vllm) -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    from finesteer_vllm.seams import EXTENSION, PLUGIN

    module, function = project["entry-points"]["vllm.general_plugins"][PLUGIN].split(":")
    assert callable(getattr(import_module(module), function))
    module, _, name = EXTENSION.rpartition(".")
    assert getattr(import_module(module), name)
    # vLLM refuses extensions that have a name of the worker's; these are the extension's own.
    assert [name for name in dir(getattr(import_module(module), name)) if not name.startswith("__")] == [
        "steering_status"
    ]
