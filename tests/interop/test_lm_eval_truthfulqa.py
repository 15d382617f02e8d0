"""lm-eval's truthfulqa_mc1 and truthfulqa_mc2 on local files, against the package's scorer and `finesteer eval`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.cli import app
from finesteer_hf.evaluation.data.playground_eval import target_prompts
from finesteer_hf.evaluation.data.truthfulqa import load_truthfulqa
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem, score_choices


lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from finesteer_hf.evaluation.harness import FineSteerLM  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore:Steering adapter:UserWarning", "error:Steering depends:UserWarning")
ROOT = Path(__file__).resolve().parents[2]
ADAPTER = str(ROOT / "hub_cards" / "playground-truthful")
PUBLISHED = ROOT.parent / "shared" / "data" / "truthfulqa" / "mc_task.json"
DEFINITIONS = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
TASKS = ("truthfulqa_mc1", "truthfulqa_mc2")
# What differs from lm-eval's definitions where a chat's one message is the question, as in `finesteer eval`.
AS_CHAT = {"doc_to_text": "{{question}}", "target_delimiter": ""}
# Imported by lm-eval with the task, before it looks for the model's name.
REGISTERS = "import finesteer_hf.evaluation.harness\n\n\ndef all_rows(rows):\n    return rows\n"


def row_of(question: str, best: str, correct: list[str], incorrect: list[str]) -> dict[str, Any]:
    """A row in the layout of the data set on the Hub, which lm-eval reads."""
    mc1, mc2 = [best, *incorrect], [best, *(answer for answer in correct if answer != best), *incorrect]
    right = len(mc2) - len(incorrect)
    return {
        "question": question,
        "mc1_targets": {"choices": mc1, "labels": [1] + [0] * len(incorrect)},
        "mc2_targets": {"choices": mc2, "labels": [1] * right + [0] * len(incorrect)},
    }


def folklore() -> list[dict[str, Any]]:
    choices = [(prompt.text, prompt.choices) for prompt in target_prompts("truthful", limit=8)]
    return [row_of(text, item.correct[0], [*item.correct], [*item.incorrect]) for text, item in choices if item]


def published() -> list[dict[str, Any]]:
    rows = []
    for row in json.loads(PUBLISHED.read_text(encoding="utf-8"))[:8]:
        (best,) = (answer for answer, label in row["mc1_targets"].items() if label)
        correct, incorrect = ([a for a, label in row["mc2_targets"].items() if label is kind] for kind in (1, 0))
        rows.append(row_of(row["question"], best, correct, incorrect))
    return rows


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(folklore, id="own rows"),
        pytest.param(
            published,
            id="published rows",
            marks=pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs ../shared/data/truthfulqa/mc_task.json"),
        ),
    ],
)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("truthfulqa") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in request.param()), encoding="utf-8")
    return path


def local(file: Path) -> dict[str, Any]:
    kwargs = {"data_files": {"validation": str(file)}, "cache_dir": str(file.parent)}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs}


def scores(lm: Any, file: Path, changes: dict[str, Any], **settings: Any) -> dict[str, float]:
    definitions = [load_yaml(DEFINITIONS / f"{name}.yaml", resolve_func=True, recursive=True) for name in TASKS]
    out = lm_eval.simple_evaluate(
        model=lm, tasks=[{**task, **local(file), **changes} for task in definitions], bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False), **settings,
    )  # fmt: skip
    return {name: out["results"][name]["acc,none"] for name in TASKS}


@pytest.fixture(scope="module")
def steered() -> tuple[Any, Any]:
    model, tokenizer = playground.load()
    return SteeredModelForCausalLM.from_model(model, steering=ADAPTER), tokenizer


@pytest.fixture(scope="module")
def eval_command(file: Path) -> dict[str, float]:
    """MC1 and MC2 of `finesteer eval`, steered at half strength."""
    out = file.parent / "figures.json"
    command = ["eval", "playground", "-s", ADAPTER, "-b", "truthfulqa", "--data", str(file), "--half", "all"]
    result = CliRunner().invoke(app, [*command, "--scale", "0.5", "--out", str(out)])
    assert result.exit_code == 0, result.output
    figures = {row["metric"]: row for row in json.loads(out.read_text(encoding="utf-8"))["figures"]}
    assert figures["MC2"]["steered"]["value"] != figures["MC2"]["unsteered"]["value"]
    return {task: figures[name]["steered"]["value"] for task, name in zip(TASKS, ("MC1", "MC2"), strict=True)}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_lm_eval_s_own_prompt(steered: tuple[Any, Any], file: Path, batch_size: int) -> None:
    """With the six questions and answers that lm-eval puts first."""
    model, tokenizer = steered
    lead = load_yaml(DEFINITIONS / "truthfulqa_mc1.yaml", resolve_func=False)["doc_to_text"]
    lead = lead.partition("{% set prompt_qa = '")[2].partition("'%}")[0]
    items = [
        ChoiceItem(
            f"{lead}\n\nQ: {question.question}\nA:",
            tuple(dict.fromkeys(f" {answer}" for answer in (question.best, *question.correct))),
            tuple(f" {answer}" for answer in question.incorrect),
        )
        for question in load_truthfulqa(file)
    ]
    own = score_choices(model, tokenizer, items)
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=batch_size, max_length=2048)
    want = dict(zip(TASKS, (own.mc1_share.value, own.mc2_mean.value), strict=True))
    assert scores(lm, file, {}) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_figures_of_finesteer_eval(
    steered: tuple[Any, Any], file: Path, eval_command: dict[str, float], batch_size: int
) -> None:
    model, tokenizer = steered
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=batch_size)
    with model.steering("default", scale=0.5):
        got = scores(lm, file, AS_CHAT, apply_chat_template=True)
    assert got == pytest.approx(eval_command, abs=1e-6)


@pytest.mark.parametrize("file", [pytest.param(folklore, id="own rows")], indirect=True)
@pytest.mark.parametrize(("command", "batch_size"), [("lm_eval", 1), ("finesteer-lm-eval", 8)])
def test_from_the_command_line(file: Path, eval_command: dict[str, float], command: str, batch_size: int) -> None:
    """lm-eval 0.4.13 reads no entry points; there the module beside a local task registers the model."""
    folder = file.parent / command
    folder.mkdir()
    for name in TASKS:
        task = {"include": str(DEFINITIONS / f"{name}.yaml"), **local(file), **AS_CHAT}
        text = json.dumps(task)[:-1]
        if command == "lm_eval":
            text += ', "process_docs": !function register.all_rows'
        (folder / f"{name}.yaml").write_text(text + "}\n", encoding="utf-8")
    (folder / "register.py").write_text(REGISTERS, encoding="utf-8")
    model_args = f"pretrained={playground.model_path()},steering={ADAPTER},steering_scale=0.5"
    done = subprocess.run(
        [Path(sys.executable).with_name(command), "run", "--model", "finesteer", "--model_args", model_args,
         "--tasks", folder, "--device", "cpu", "--batch_size", str(batch_size), "--apply_chat_template",
         "--output_path", folder / "out"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (folder / "out").rglob("results_*.json")
    results = json.loads(written.read_text(encoding="utf-8"))
    assert results["config"]["steering"]["default"]["scale"] == 0.5
    got = {name: results["results"][name]["acc,none"] for name in TASKS}
    assert got == pytest.approx(eval_command, abs=1e-6)
