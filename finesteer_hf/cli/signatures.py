"""A function's keyword parameters, read from its source without importing it.

Importing the code that fits or loads a model takes seconds, mostly for torch and transformers. `--help` should not
wait for that, and a second list of options here would go stale. So the options are read from the source.
"""

from __future__ import annotations

import ast
import functools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any


PACKAGE = Path(__file__).resolve().parents[1]
_SCALARS: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "Path": str}


@dataclass(frozen=True)
class Parameter:
    """A keyword parameter.

    Attributes:
        name: name in the function.
        kinds: its scalar types; a non-scalar (a data set) is a string here: a file or an id.
        choices: the values of a `Literal`; empty if there is none.
        default: its default; `...` if it has none.
        optional: whether it may be None.
        help: its text in the function's docstring, on one line.
    """

    name: str
    kinds: tuple[type, ...]
    choices: tuple[str, ...]
    default: Any
    optional: bool
    help: str


@functools.cache
def keyword_parameters(module: str, function: str) -> tuple[Parameter, ...]:
    """Read the keyword-only parameters of a function of this package.

    Args:
        module: file of the module inside the package, such as `fitting/fit.py`.
        function: name of a function at module level.

    Raises:
        LookupError: if there is no such function.
    """
    tree = _tree(PACKAGE / module)
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if not found:
        raise LookupError(f"{module} has no function {function!r}.")
    (node,) = found
    told = argument_texts(ast.get_docstring(node) or "")
    parameters = []
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        kinds, choices = _kinds(argument.annotation, tree)
        parameters.append(
            Parameter(
                name=argument.arg,
                kinds=tuple(kind for kind in kinds if kind is not type(None)),
                choices=choices,
                default=... if default is None else _value(default, tree),
                optional=type(None) in kinds,
                help=told.get(argument.arg, ""),
            )
        )
    return tuple(parameters)


def argument_texts(docstring: str) -> dict[str, str]:
    """The texts of a docstring's `Args:` by name, each on one line."""
    texts: dict[str, list[str]] = {}
    current: list[str] = []
    lines = docstring.splitlines()
    start = lines.index("Args:") + 1 if "Args:" in lines else len(lines)
    for line in lines[start:]:
        if line and not line.startswith(" "):
            break
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            current = texts.setdefault(name, [])
            current.append(text)
        elif line.strip():
            current.append(line.strip())
    return {name: " ".join(parts) for name, parts in texts.items()}


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(textwrap.dedent(path.read_text(encoding="utf-8")))


def _kinds(annotation: ast.expr | None, tree: ast.Module) -> tuple[tuple[type, ...], tuple[str, ...]]:
    """The scalar types of an annotation, and the values of a `Literal` in it."""
    if isinstance(annotation, ast.BinOp):
        left, right = _kinds(annotation.left, tree), _kinds(annotation.right, tree)
        return tuple(dict.fromkeys(left[0] + right[0])), left[1] + right[1]
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return (type(None),), ()
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        values = ast.literal_eval(annotation.slice)
        return (str,), values if isinstance(values, tuple) else (values,)
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "list":
        return (list,), ()
    if isinstance(annotation, ast.Name):
        if annotation.id in _SCALARS:
            return (_SCALARS[annotation.id],), ()
        alias = _named(annotation.id, tree)
        if isinstance(alias, ast.Subscript):
            return _kinds(alias, tree)
    return (str,), ()


def _value(default: ast.expr, tree: ast.Module) -> Any:
    """A default: a constant, or the name of one."""
    if isinstance(default, ast.Name):
        named = _named(default.id, tree)
        assert named is not None, f"the default {default.id} is not a constant of the package"
        default = named
    return ast.literal_eval(default)


def _named(name: str, tree: ast.Module) -> ast.expr | None:
    """The value of a module-level name, followed through imports within this package."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return node.value
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            parts = (node.module or "").split(".")
            path = PACKAGE.joinpath(*parts[1:]).with_suffix(".py")
            if parts[0] == PACKAGE.name and path.is_file():
                return _named(name, _tree(path))
    return None
