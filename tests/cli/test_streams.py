"""What the command line imports, where it writes, and how ctrl-C ends it."""

from __future__ import annotations

import json
import os
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
        {interrupted}

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
    # Some packages, such as torchao, print lines of their own while they are imported.
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "stopped"), done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_ctrl_c_during_a_fit_leaves_no_adapter_and_the_same_command_continues(base: str) -> None:
    # Before anything is kept, there is nothing to go on from.
    code = "os.kill(os.getpid(), signal.SIGINT); yield batch"
    done = python(INTERRUPTED_FIT.format(arguments=fit_arguments(base), interrupted=code))
    assert done.returncode == 130 and done.stderr.strip().splitlines()[-1] == "stopped", done.stderr
    assert not list(Path(base).parent.glob("adapter*"))
    code = "yield batch; os.kill(os.getpid(), signal.SIGINT)"
    done = python(INTERRUPTED_FIT.format(arguments=fit_arguments(base), interrupted=code))
    assert done.returncode == 130, done.stderr
    adapter = Path(base).with_name("adapter")
    states = adapter.with_name("adapter.states")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("stopped; ") and str(states) in last and "same command" in last
    assert "Traceback" not in done.stderr and not adapter.exists()
    kept = list(states.rglob("*.safetensors"))
    assert kept
    result = CliRunner().invoke(app, [*fit_arguments(base), "--json"])
    assert result.exit_code == 0, result.output
    saved = json.loads(result.stdout)
    assert saved["saved"] == str(adapter) and (adapter / "steering_config.json").is_file()
    # What was captured before the interrupt was not captured again.
    whole = CliRunner().invoke(app, [*fit_arguments(base), "--json"])
    passes = [made["fit"]["capture"]["passes"] for made in (saved, json.loads(whole.stdout))]
    assert passes[0] < passes[1]
    assert not states.exists()


def test_a_store_of_the_user_is_kept(base: str) -> None:
    store = Path(base).with_name("store")
    result = CliRunner().invoke(app, [*fit_arguments(base), "--store-dir", str(store)])
    assert result.exit_code == 0, result.output
    assert list(store.rglob("*.safetensors"))


def test_the_traceback_is_for_debug_and_a_bug_is_called_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from finesteer_hf.adapters import registry

    plain, full = (CliRunner().invoke(app, ["methods", "nothing", *more]) for more in ([], ["--debug"]))
    assert plain.exit_code == full.exit_code == 1
    assert "hint: finesteer methods" in plain.stderr and "Traceback" not in plain.stderr
    assert plain.stderr.splitlines()[0].startswith("error: Unknown steering_type")
    assert "Traceback" in full.stderr and "UnknownMethodError" in full.stderr

    def broken() -> None:
        raise RuntimeError("odd\nthing")

    monkeypatch.setattr(registry, "steering_methods", broken)
    result = CliRunner().invoke(app, ["methods"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "error: RuntimeError: odd thing",
        "hint: this is a bug; --debug shows the traceback.",
    ]


def test_results_are_json_where_asked(base: str, half_plane: None) -> None:
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    without = [name for name, command in commands.items() if not any("--json" in p.opts for p in command.params)]
    # These run until they are stopped, and print no result.
    assert without == ["serve", "ui"]
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)
    assert {"method", "config", "summary"} == set(listed[0])
    caa = json.loads(CliRunner().invoke(app, ["methods", "caa", "--json"]).stdout)
    assert "layer" in [field["setting"] for field in caa["settings"]]


def test_the_shell_completes_commands_and_options() -> None:
    completed = {}
    for words, position in (("finesteer con", 1), ("finesteer convert --t", 2)):
        env = {**os.environ, "_FINESTEER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        code = "import sys; sys.argv = ['finesteer']; from finesteer_hf.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        completed[words] = done.stdout.split()
    assert completed == {"finesteer con": ["convert"], "finesteer convert --t": ["--to"]}
