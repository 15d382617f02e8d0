"""docs/cli.md has all existing commands and options, on screens of 80 columns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from finesteer_hf.cli.commands import app


PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## finesteer ")[1:])


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def test_every_command_has_a_section() -> None:
    assert set(SECTIONS) == set(COMMANDS)
    assert all(f"  {name} " in PAGE.split("\n## ")[0] for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_section_shows_the_options_that_exist(name: str) -> None:
    # Screens wrap long names nowhere, so each is found as it is.
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", SECTIONS[name]))
    real = {option for option in options(COMMANDS[name]) if option.startswith("--")}
    assert real <= shown, sorted(real - shown)
    elsewhere = {option for command in COMMANDS.values() for option in options(command)}
    assert shown <= elsewhere, sorted(shown - elsewhere)


def test_the_introduction_names_options_that_exist() -> None:
    every = {"--version", "--install-completion", "--show-completion"}
    every = every.union(*map(options, COMMANDS.values()))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", PAGE.split("\n## ")[0])) <= every


def test_screens_are_80_columns_wide() -> None:
    screens = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    assert len(screens) > 2 * len(COMMANDS) - 3
    wide = [line for screen in screens for line in screen.splitlines() if len(line) > 80]
    assert wide == []
    assert not re.search(r"/tmp|/home|/work|Traceback", PAGE)
