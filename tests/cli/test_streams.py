"""What the command line imports, where it writes, and how ctrl-C ends it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation_toys import half_plane_adapter
from typer.testing import CliRunner

from finesteer_hf.cli.commands import app
from finesteer_hf.testing.toy import toy_model, toy_preferences, toy_tokenizer


HEAVY = ("torch", "transformers", "datasets", "sklearn", "scipy", "matplotlib", "peft", "numpy", "huggingface_hub")
COMMANDS = tuple(str(command.name) for command in app.registered_commands)

# Presses ctrl-C when the module of a name is first looked for; ends as a shell would see it.
INTERRUPTED_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            return None

sys.meta_path.insert(0, Finder())
sys.argv = ["finesteer", *{arguments!r}]
from finesteer_hf.cli import main
main()
"""

INTERRUPTED_FIT = """
import os, signal, sys
from finesteer_hf.fitting.capture import reader as capture
usual = capture.StateReader.read

def read(self, *args, **kwargs):
    for batch in usual(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        yield batch

capture.StateReader.read = read
sys.argv = ["finesteer", *{arguments!r}]
from finesteer_hf.cli import main
main()
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A toy model's folder with a file of rows."""
    toy_model().save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in toy_preferences()))
    return str(tmp_path / "base")


def fit_arguments(base: str) -> list[str]:
    rows, out = Path(base).with_name("rows.jsonl"), Path(base).with_name("adapter")
    return ["fit", base, str(rows), "-o", str(out), "--method", "CAA", "--set", "layer=1", "--set", "strength=1.0"]


def test_help_imports_nothing_slow() -> None:
    code = f"""
import sys
from finesteer_hf.cli.commands import app
from typer.testing import CliRunner
for arguments in [["--help"], ["--version"], *([name, "--help"] for name in {COMMANDS!r})]:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_package_imports_nothing_before_first_use() -> None:
    done = python(f"import finesteer_hf, sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr
    assert python("import finesteer_hf; print(finesteer_hf.processors.Decision.__name__)").stdout.strip() == "Decision"


def test_progress_goes_to_stderr_and_results_to_stdout(base: str) -> None:
    arguments = [*fit_arguments(base)[:-1], "strength=auto"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    # The table of what was saved, alone.
    assert "warning: the tokenizer has a chat template" in result.stderr
    lines = [line.strip("┃│ ").split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines if line and line[0].isalpha()] == ["saved", "strength", "files"]


def test_warnings_are_messages_without_a_source_line(base: str, half_plane: None, tmp_path: Path) -> None:
    adapter = half_plane_adapter(torch.ones(32), hidden_size=32, base_model_name_or_path="org/another")
    adapter.save_pretrained(tmp_path / "steering")
    arguments = ["generate", base, "-s", str(tmp_path / "steering"), "-p", "sun1", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "warning: Steering adapter" in result.stderr and "org/another" in result.stderr
    assert ".py" not in result.stderr and "warnings.warn" not in result.stderr
    assert "warning" not in result.stdout and "steered" in result.stdout


@pytest.mark.parametrize(
    "module",
    ["typer", "rich.console", "torch", "transformers", "finesteer_hf.model.verbs", "finesteer_hf.adapters.adapter"],
)
def test_ctrl_c_during_imports_ends_in_one_line(module: str) -> None:
    done = python(INTERRUPTED_IMPORT.format(module=module, arguments=["generate", "nowhere", "-p", "hello"]))
    assert (done.returncode, done.stderr) == (130, "stopped\n"), done.stderr
    assert done.stdout == ""


def test_ctrl_c_during_a_fit_ends_in_one_line_and_leaves_no_adapter(base: str) -> None:
    done = python(INTERRUPTED_FIT.format(arguments=fit_arguments(base)))
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "stopped" and "Traceback" not in done.stderr
    assert not Path(base).with_name("adapter").exists()
