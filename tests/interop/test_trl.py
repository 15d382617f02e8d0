"""TRL's trainers on a steered model: their masks give the prompt's end, and LoRA trains beside the steering."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.errors import PromptEndWarning, UnsupportedModelError
from finesteer_hf.evaluation.measures.likelihood import token_log_probs


trl = pytest.importorskip("trl", reason="TRL is not installed (the extra `train`)")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Steering adapter:UserWarning", "ignore:.*deprecated:FutureWarning", "error:Steering depends:UserWarning"
)
ADAPTER = Path(__file__).resolve().parents[2] / "hub_cards" / "playground-truthful"
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    # Prompts of several lengths, so that each row of a batch ends its prompt elsewhere.
    return sorted(playground.preference_rows("truthful", "test")[:40], key=lambda row: len(str(row["prompt"])))[::13]


@pytest.fixture
def steered() -> tuple[Any, Any]:
    model, tokenizer = playground.load()
    return SteeredModelForCausalLM.from_model(model, steering=str(ADAPTER)), tokenizer


def arguments(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": len(rows), "learning_rate": 0.05,
        "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip


def log_probs(model: Any, tokenizer: Any, rows: list[dict[str, Any]], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the answers with the ends of their turns, by `prompt_lengths`, and their numbers of tokens."""
    prompts, answers = [], []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=False)
        assert whole[: len(prompt)] == prompt
        prompts.append(prompt)
        answers.append(whole[len(prompt) :])
    return token_log_probs(model, prompts, answers), np.array([len(answer) for answer in answers])


def batch_of(trainer: Any) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def loss_of(trainer: Any) -> float:
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch_of(trainer)))


def sft_trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], folder: Path, **settings: Any) -> Any:
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    config = trl.SFTConfig(**arguments(folder, rows), **settings)
    return trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_lora_alone_learns(trainer: Any, model: Any) -> None:
    """Two steps change the LoRA; the steering does not change and has no gradient."""
    kept = {name: tensor.clone() for name, tensor in model.steering_adapters["default"].tensors.items()}
    before = trained(trainer)
    trainer.train()
    assert all("lora_" in name for name in before)
    assert any(not torch.equal(before[name], value) for name, value in trained(trainer).items())
    for name, tensor in model.steering_adapters["default"].tensors.items():
        assert torch.equal(tensor, kept[name]) and tensor.grad is None and not tensor.requires_grad


@pytest.mark.parametrize("lora", [True, False])
def test_sft_sees_the_steered_loss(steered, rows, tmp_path, lora):
    model, tokenizer = steered
    called = get_peft_model(model, LORA) if lora else model
    sums, tokens = log_probs(called, tokenizer, rows, "chosen")
    with model.disable_steering():
        unsteered, _ = log_probs(called, tokenizer, rows, "chosen")
    trainer = sft_trainer(called, tokenizer, rows, tmp_path)
    got = loss_of(trainer)
    assert got == pytest.approx(-sums.sum() / tokens.sum(), abs=1e-5)
    assert abs(got + unsteered.sum() / tokens.sum()) > 0.01
    if lora:
        assert_lora_alone_learns(trainer, model)


def test_dpo_sees_the_steered_loss(steered, rows, tmp_path):
    model, tokenizer = steered
    data = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    config = trl.DPOConfig(**arguments(tmp_path, rows), beta=0.1)
    trainer = trl.DPOTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=LORA
    )
    lora = trainer.model.eval()

    def margins() -> np.ndarray:
        return log_probs(lora, tokenizer, rows, "chosen")[0] - log_probs(lora, tokenizer, rows, "rejected")[0]

    def by_hand() -> float:
        policy = margins()
        # The reference is the steered model without the LoRA.
        with lora.disable_adapter():
            reference = margins()
        return float(np.log1p(np.exp(-0.1 * (policy - reference))).mean())

    with model.disable_steering():
        unsteered = by_hand()
    got = loss_of(trainer)
    assert got == pytest.approx(by_hand(), abs=1e-5)
    assert abs(got - unsteered) > 1e-3
    assert_lora_alone_learns(trainer, model)


def test_texts_without_a_prompt_warn(steered, rows, tmp_path):
    model, tokenizer = steered
    data = Dataset.from_list([{"messages": row["prompt"] + row["chosen"]} for row in rows])
    config = trl.SFTConfig(**arguments(tmp_path, rows))
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.warns(PromptEndWarning, match="prompt_lengths"):
            loss_of(trainer)


def test_padding_free_training_is_refused(steered, rows, tmp_path):
    model, tokenizer = steered
    trainer = sft_trainer(model, tokenizer, rows, tmp_path, padding_free=True, max_length=None)
    with pytest.raises(UnsupportedModelError, match="several texts"):
        loss_of(trainer)
