"""Command options made from a function's keyword parameters."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

import typer

from finesteer_hf.cli.signatures import Parameter, keyword_parameters


NONE = "none"


@dataclass(frozen=True)
class OptionsOf:
    """A function whose keyword parameters become a command's options.

    Attributes:
        module: file of its module inside the package.
        function: its name.
        without: parameters to leave out.
        also: further option names, such as `-s`, by parameter.
    """

    module: str
    function: str
    without: Sequence[str] = ()
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def parameters(self) -> list[Parameter]:
        """The parameters that become options."""
        return [p for p in keyword_parameters(self.module, self.function) if p.name not in self.without]


FIT = OptionsOf("fitting/fit.py", "fit_steering", also={"general_dataset": ("--general",), "store_dir": ("--store",)})
BENCHMARK = OptionsOf("evaluation/data/benchmarks.py", "load_benchmark")
# A token on a command line stays in the shell's history: `hf auth login` or HF_TOKEN instead.
PUSH = OptionsOf("hub/push.py", "push_adapter", without=("token",))
VECTORS = OptionsOf("interop/load.py", "load_vectors")
LOAD = OptionsOf("cli/common.py", "load", also={"steering": ("-s",)})


def takes(**groups: OptionsOf) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of other functions.

    Args:
        **groups: the function for each argument of the command that receives keyword arguments as a dict.

    Example:
        >>> @takes(fitting=FIT)
        ... def fit(data: str, *, fitting: dict[str, Any]) -> None:
        ...     fit_steering(model, tokenizer, data, **fitting)
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        made = {name: [_option(p, options) for p in options.parameters()] for name, options in groups.items()}

        @functools.wraps(command)
        def run(**values: Any) -> None:
            for group, options in made.items():
                values[group] = {option.name: _plain(values.pop(option.name)) for option in options}
            command(**values)

        kept = [p for name, p in own.parameters.items() if name not in groups]
        every = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*kept, *itertools.chain(*made.values())]]
        run.__signature__ = own.replace(parameters=every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        return run

    return decorate


def _option(parameter: Parameter, options: OptionsOf) -> inspect.Parameter:
    """A parameter in typer's form."""
    settings: dict[str, Any] = {"help": _sentence(parameter.help)}
    also = options.also.get(parameter.name, ())
    names = [f"--{parameter.name.replace('_', '-')}", *also] if also else []
    kind: Any = parameter.kinds[0]
    if kind is list:
        kind = list[str]
    elif parameter.choices:
        kind = _choice(parameter)
    elif len(parameter.kinds) > 1 or (parameter.optional and parameter.default is not None):
        kind = str
        settings |= {"parser": functools.partial(_read, parameter), "metavar": _metavar(parameter)}
    default = inspect.Parameter.empty if parameter.default is ... else parameter.default
    if default is None:
        kind = kind | None
    elif parameter.choices and default is not inspect.Parameter.empty:
        default = kind(default)
    elif "parser" in settings:
        default = str(default)
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*names, **settings)],
    )


def _choice(parameter: Parameter) -> Any:
    """An Enum of a parameter's values, which all versions of typer accept."""
    return Enum(parameter.name, {value: value for value in parameter.choices})


def _metavar(parameter: Parameter) -> str:
    return f"<{'|'.join([*(kind.__name__ for kind in parameter.kinds), *([NONE] if parameter.optional else [])])}>"


def _read(parameter: Parameter, text: str) -> Any:
    """Parse a text as the first of the parameter's types that accepts it; `none` is None where allowed."""
    if parameter.optional and text == NONE:
        return None
    for kind in sorted(parameter.kinds, key=lambda each: each is str):
        try:
            return kind(text)
        except ValueError:
            continue
    raise typer.BadParameter(f"{text!r} is not {_metavar(parameter)}.")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _sentence(text: str) -> str:
    """The first sentence of a parameter's text, capitalised and without backticks."""
    first = re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(".;").replace("`", "")
    return f"{first[:1].upper()}{first[1:]}." if first else ""


def assignments(option: str, texts: Sequence[str], known: Sequence[str] | None = None) -> dict[str, Any]:
    """Read `name=value` arguments; a value that is not JSON is a string.

    Args:
        option: the option's name, for the message.
        texts: the arguments.
        known: the known names; None allows any.

    Raises:
        ValueError: for an argument without `=`, or an unknown name; lists the known ones.
    """
    values: dict[str, Any] = {}
    for given in texts:
        name, equals, text = given.partition("=")
        if not equals or not name or (known is not None and name not in known):
            which = "" if known is None else f" with one of: {', '.join(sorted(known))}"
            raise ValueError(f"{option} {given!r}: write name=value{which}.")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values
