"""lm-eval's model `finesteer`: it decides on the context, and its scores are those of the package's own scorer."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from finesteer_hf import ConstantVector, SteeredModelForCausalLM, playground
from finesteer_hf.errors import PromptEndWarning
from finesteer_hf.evaluation.data.playground_eval import general_prompts, target_prompts
from finesteer_hf.evaluation.measures.generation import greedy_answers
from finesteer_hf.evaluation.measures.likelihood import token_log_probs
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem, score_choices
from finesteer_hf.evaluation.measures.prompts import encode_prompt
from finesteer_hf.evaluation.measures.scoring import answer_log_probs


lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from finesteer_hf.evaluation import harness  # noqa: E402
from finesteer_hf.evaluation.harness import FineSteerLM  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore:Steering adapter:UserWarning", "error:Steering depends:UserWarning")
ROOT = Path(__file__).resolve().parents[2]
ADAPTER = str(ROOT / "hub_cards" / "playground-truthful")
OTHER = str(ROOT / "hub_cards" / "playground-safety")


@pytest.fixture(scope="module")
def steered() -> tuple[Any, Any]:
    # In float64, sums do not depend on the shape of a batch beyond what is asked for here.
    model, tokenizer = playground.load(torch.float64)
    return SteeredModelForCausalLM.from_model(model, steering={"truthful": ADAPTER, "safety": OTHER}), tokenizer


@pytest.fixture(scope="module")
def items() -> list[ChoiceItem]:
    """Questions of several lengths, each with its best answer and the wrong ones; the gate opens on most."""
    choices = [prompt.choices for prompt in target_prompts("truthful", limit=12)]
    return [ChoiceItem(item.prompt, item.correct[:1], item.incorrect) for item in choices]


@pytest.fixture(scope="module")
def task(items, tmp_path_factory) -> dict[str, Any]:
    """A local task in lm-eval's own format, whose accuracy is MC1."""
    file = tmp_path_factory.mktemp("task") / "rows.jsonl"
    rows = [{"question": i.prompt[-1]["content"], "choices": [*i.correct, *i.incorrect]} for i in items]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "task": "playground_mc1", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent)},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": 0, "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def evaluated(lm: Any, task: dict[str, Any], **settings: Any) -> tuple[float, np.ndarray, dict[str, Any]]:
    """Accuracy, the log-probabilities in the order of the rows, and the whole output."""
    out = lm_eval.simple_evaluate(
        model=lm, tasks=[dict(task)], task_manager=TaskManager(include_defaults=False), apply_chat_template=True,
        bootstrap_iters=0, **settings,
    )  # fmt: skip
    samples = sorted(out["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    scores = [float(response[0][0]) for sample in samples for response in sample["resps"]]
    return out["results"][task["task"]]["acc,none"], np.array(scores), out


def own_scores(model: Any, tokenizer: Any, items: list[ChoiceItem]) -> tuple[float, np.ndarray]:
    prompts = [item.prompt for item in items for _ in (*item.correct, *item.incorrect)]
    answers = [answer for item in items for answer in (*item.correct, *item.incorrect)]
    mc1 = score_choices(model, tokenizer, items).mc1_share.value
    return mc1, answer_log_probs(model, tokenizer, prompts, answers)


def ask(lm: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], True)


def forwards_of(model: Any) -> list[int]:
    """Rows of each forward from now on."""
    rows: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize("batch_size", [1, 8])
def test_scores_are_those_of_the_own_scorer(steered, items, task, batch_size):
    model, tokenizer = steered
    mc1, want = own_scores(model, tokenizer, items)
    accuracy, got, out = evaluated(FineSteerLM(model, tokenizer=tokenizer, batch_size=batch_size), task)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert accuracy == pytest.approx(mc1)
    assert out["config"]["steering"]["truthful"]["scale"] == 1.0
    with model.disable_steering():
        unsteered, _ = own_scores(model, tokenizer, items)
    assert mc1 > unsteered + 0.3


def test_the_base_scores_as_in_hflm_to_the_bit(steered, task):
    model, tokenizer = steered
    with model.disable_steering():
        want = evaluated(HFLM(model, tokenizer=tokenizer, batch_size=8), task)
        got = evaluated(FineSteerLM(model, tokenizer=tokenizer, batch_size=8), task)
        assert got[0] == want[0] and np.array_equal(got[1], want[1]) and got[2]["config"]["steering"] == {}
    with model.steering("truthful", scale=0.0):
        assert np.array_equal(evaluated(FineSteerLM(model, tokenizer=tokenizer, batch_size=8), task)[1], want[1])


@pytest.mark.filterwarnings("default:Steering depends:UserWarning")
def test_hflm_itself_warns(items):
    model, tokenizer = playground.load()
    SteeredModelForCausalLM.from_model(model, steering=ADAPTER)
    lm = HFLM(model, tokenizer=tokenizer, batch_size=4)
    with pytest.warns(PromptEndWarning, match="finesteer"):
        ask(lm, ("What is known of warts?", " Old books say"))


def test_options_that_differ_in_one_token_share_a_forward(items):
    model, tokenizer = playground.load()
    SteeredModelForCausalLM.from_model(model, steering=ADAPTER)
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=8)
    context = lm.apply_chat_template(items[0].prompt)
    options = [" the", " no", "A", "B"]
    assert all(len(lm.tok_encode(option)) == 1 for option in options)
    want = token_log_probs(model, [lm.tok_encode(context)] * 4, [lm.tok_encode(option) for option in options])
    rows = forwards_of(model)
    got = ask(lm, *((context, option) for option in options))
    assert rows == [1]
    np.testing.assert_allclose([score for score, _ in got], want, rtol=1e-6, atol=1e-6)


def test_one_text_with_two_prompts_is_two_rows(steered, items):
    model, tokenizer = steered
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=8)
    context = lm.apply_chat_template(items[0].prompt)
    start, end = " Old books", " say"
    got = ask(lm, (context, start + end), (context + start, end))
    ids, first, last = lm.tok_encode(context), lm.tok_encode(start), lm.tok_encode(end)
    want = token_log_probs(model, [ids, ids + first], [first + last, last])
    np.testing.assert_allclose([score for score, _ in got], want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_newline_that_ends_a_template_belongs_to_the_prompt(steered, items):
    model, tokenizer = steered
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=8)
    context, answer = lm.apply_chat_template(items[0].prompt) + "\n", items[0].correct[0]
    prompt, whole = lm.tok_encode(context), lm.tok_encode(context + answer)
    assert whole[: len(prompt)] == prompt
    logits = model(torch.tensor([whole]), prompt_lengths=[len(prompt)]).logits[0].log_softmax(-1)
    # lm-eval scores the newline with the answer.
    want = sum(float(logits[place - 1, whole[place]]) for place in range(len(prompt) - 1, len(whole)))
    other = model(torch.tensor([whole]), prompt_lengths=[len(prompt) - 1]).logits[0].log_softmax(-1)
    assert not torch.equal(other, logits)
    assert ask(lm, (context, answer))[0][0] == pytest.approx(want, rel=1e-6)


def test_contexts_that_are_too_long_lose_their_beginning(steered, items):
    model, tokenizer = steered
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=2, max_length=16)
    context, answer = lm.apply_chat_template(items[0].prompt), " Old books say"
    long = "Once upon a time there was a long story. " * 3 + context
    ids, length = lm.tok_encode(long + answer)[-17:], len(lm.tok_encode(answer))
    want = token_log_probs(model, [ids[:-length]], [ids[-length:]])
    np.testing.assert_allclose(ask(lm, (long, answer))[0][0], want[0], rtol=1e-6)


def test_a_running_text_is_decided_on_at_its_first_token(steered):
    model, tokenizer = steered
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=3, max_length=8)
    text = "The sun rises in the east and sets in the west, as everyone who looks at it can tell."
    ids = lm.tok_encode(text)
    windows = [([lm.prefix_token_id], ids[:8])]
    windows += [([ids[start - 1]], ids[start : start + 8]) for start in range(8, len(ids), 8)]
    if len(windows[-1][1]) < 8:
        # lm-eval keeps the last window full: what it does not score is context.
        rest = len(windows[-1][1])
        windows[-1] = (ids[-9 : len(ids) - rest], ids[-rest:])
    want = token_log_probs(model, *map(list, zip(*windows, strict=True))).sum()
    got = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], True)
    np.testing.assert_allclose(got, [want], rtol=1e-6)
    # Nothing before it: the same token stands for the prompt.
    assert ask(lm, ("", " ".join(text.split()[:3])))[0][0] == pytest.approx(
        token_log_probs(model, [[lm.prefix_token_id]], [lm.tok_encode("The sun rises")])[0], rel=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 8])
def test_generate_until_answers_as_generate_does(steered, batch_size):
    model, tokenizer = steered
    prompts = [p.prompt for p in (*target_prompts("truthful", limit=6), *general_prompts(limit=6))]
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=batch_size)
    settings = {"until": ["<|end|>"], "max_gen_toks": 16, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (lm.apply_chat_template(prompt), settings), index)
        for index, prompt in enumerate(prompts)
    ]
    want = greedy_answers(model, tokenizer, prompts, max_new_tokens=16).texts
    assert [text.strip() for text in lm.generate_until(requests, True)] == [text.strip() for text in want]
    with model.disable_steering():
        assert greedy_answers(model, tokenizer, prompts, max_new_tokens=16).texts != want


def test_batch_size_auto(steered, items, task):
    model, tokenizer = steered
    lm = FineSteerLM(model, tokenizer=tokenizer, batch_size="auto", max_batch_size=2)
    np.testing.assert_allclose(evaluated(lm, task)[1], own_scores(model, tokenizer, items)[1], rtol=1e-6, atol=1e-6)


def test_cached_answers_are_keyed_by_the_steering(task, tmp_path):
    model, tokenizer = playground.load()
    SteeredModelForCausalLM.from_model(model, steering={"truthful": ADAPTER, "safety": OTHER})
    rows = forwards_of(model)
    states = [{"truthful": 1.0}, {"truthful": 0.5}, None, {"safety": 1.0}]

    def run(state: Any) -> np.ndarray:
        with model.steering(state):
            lm = FineSteerLM(model, tokenizer=tokenizer, batch_size=8)
            return evaluated(lm, task, use_cache=str(tmp_path / "answers"), limit=4)[1]

    first = [run(state) for state in states]
    assert all(not np.array_equal(first[0], other) for other in first[1:3])
    made = len(rows)
    assert np.array_equal(run(states[0]), first[0]) and np.array_equal(run(None), first[2])
    assert len(rows) == made
    # An adapter that is replaced under its name is another one.
    model.load_steering(model.steering_adapters["safety"], "truthful")
    assert np.array_equal(run({"truthful": 1.0}), first[3])
    with model.steering_with([ConstantVector("resid_post[1]", torch.ones(model.config.hidden_size))]):
        lm = FineSteerLM(model, tokenizer=tokenizer)
        with pytest.raises(ValueError, match="use_cache"):
            evaluated(lm, task, use_cache=str(tmp_path / "answers"), limit=1)


@pytest.mark.parametrize(
    ("steering", "scale", "active"),
    [
        (ADAPTER, 1.0, {"default": 1.0}),
        (ADAPTER, 0.5, {"default": 0.5}),
        ({"a": ADAPTER, "b": OTHER}, 2.0, {"a": 2.0, "b": 2.0}),
        ({"a": ADAPTER, "b": OTHER}, {"b": 0.5}, {"b": 0.5}),
        (json.dumps({"a": ADAPTER}), json.dumps({"a": 2}), {"a": 2.0}),
        (None, 1.0, {}),
    ],
)
def test_model_args(steering, scale, active):
    lm = FineSteerLM(playground.model_path(), steering=steering, steering_scale=scale, device="cpu")
    assert lm.model.active_steering == active


def test_arguments_that_are_refused(steered):
    model, tokenizer = steered
    base, _ = playground.load()
    for pretrained, settings, message in (
        (base, {}, "not steered"),
        (model, {"steering": ADAPTER}, "with its own steering"),
        (model, {"steering_scale": 2.0}, "with its own steering"),
        (playground.model_path(), {"steering_scale": 2.0}, "no `steering`"),
        (playground.model_path(), {"steering": ADAPTER, "steering_scale": {"b": 1.0}}, "'default'"),
        (playground.model_path(), {"steering": '{"a": '}, "not JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            FineSteerLM(pretrained, tokenizer=tokenizer, device="cpu", **settings)
    with pytest.raises(FileNotFoundError):
        FineSteerLM(playground.model_path(), steering=str(ROOT / "nothing"), device="cpu")
    with pytest.raises(ValueError, match="Request 0"):
        ask(FineSteerLM(model, tokenizer=tokenizer), ("a", ""))


def test_with_a_lora(items, task, tmp_path):
    base, tokenizer = playground.load()
    torch.manual_seed(0)
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    SteeredModelForCausalLM.from_model(lora, steering=ADAPTER)
    want = own_scores(lora, tokenizer, items)[1]
    args = {"pretrained": playground.model_path(), "peft": str(tmp_path / "lora"), "steering": ADAPTER}
    lm = FineSteerLM.create_from_arg_obj(args, {"batch_size": 8, "device": "cpu"})
    np.testing.assert_allclose(evaluated(lm, task)[1], want, rtol=1e-5, atol=1e-5)


def test_from_the_command_line(steered, items, task, tmp_path, monkeypatch):
    """In this process, with lm-eval's own main function, offline."""
    model, tokenizer = steered
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "playground_mc1.yaml").write_text(json.dumps(task), encoding="utf-8")
    arguments = f"pretrained={playground.model_path()},steering={ADAPTER},steering_scale=0.5"
    monkeypatch.setattr(
        sys, "argv",
        ["lm_eval", "--model", "finesteer", "--model_args", arguments, "--tasks", str(folder / "playground_mc1.yaml"),
         "--device", "cpu", "--batch_size", "8", "--apply_chat_template", "--output_path", str(tmp_path / "out")],
    )  # fmt: skip
    harness.main()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    with model.steering("truthful", scale=0.5):
        want, _ = own_scores(model, tokenizer, items)
    assert written["results"]["playground_mc1"]["acc,none"] == pytest.approx(want)
    assert written["config"]["steering"]["default"]["scale"] == 0.5


def test_the_entry_point_of_lm_eval_leads_here():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'\[project\.entry-points\."lm_eval\.models"\]\nfinesteer = "(.*)"', text)
    assert found
    assert EntryPoint("finesteer", found[1], "lm_eval.models").load() is FineSteerLM


def test_prompts_are_encoded_as_generate_sees_them(steered, items):
    model, tokenizer = steered
    lm = FineSteerLM(model, tokenizer=tokenizer)
    assert lm.tok_encode(lm.apply_chat_template(items[0].prompt)) == encode_prompt(tokenizer, items[0].prompt)
