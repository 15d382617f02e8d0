"""Training with steering on: the loss and gradients of a plain hook, checkpointed or not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from steered_tiny import BUILDERS, greedy, query_shift, reference, some_prompts, steer_tiny, tiny_llama
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


SITES = ["resid_pre[1]", "head_out[2]", "resid_post[1]"]
CHECKPOINTS = {
    "stored": None,
    "recomputed": {"use_reentrant": False},
    "recomputed-reentrant": {"use_reentrant": True},
}


def lora_config() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def gradients(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def checkpointed(model: Any, settings: dict[str, Any] | None) -> Any:
    if settings is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        if settings["use_reentrant"]:
            model.enable_input_require_grads()
    return model.train()


def assert_same(got: Any, want: Any) -> None:
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys() and want[1]
    for name, gradient in want[1].items():
        assert torch.equal(got[1][name], gradient), name


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    ("kind", "how"),
    # One model is enough for the older variant.
    [("llama", how) for how in CHECKPOINTS] + [("gpt2", how) for how in CHECKPOINTS if how != "recomputed-reentrant"],
)
def test_loss_and_gradients(kind: str, how: str, site: str) -> None:
    ids, adapter = some_prompts(), query_shift(site)
    plain = checkpointed(BUILDERS[kind]().apply(without_dropout), CHECKPOINTS[how])
    unsteered = gradients(plain, ids)
    with reference(plain, adapter, ids):
        want = gradients(plain, ids)
    assert not torch.equal(unsteered[0], want[0])

    steered = steer_tiny(BUILDERS[kind]().apply(without_dropout), adapter)
    checkpointed(steered, CHECKPOINTS[how])
    before = adapter.tensors["map"].clone()
    for _ in range(2):
        assert_same(gradients(steered, ids), want)
    assert torch.equal(adapter.tensors["map"], before) and adapter.tensors["map"].grad is None
    with steered.disable_steering():
        assert_same(gradients(steered, ids), unsteered)
    # The backward pass belongs to its forward, also when it runs outside the block.
    steered.set_steering(None)
    with steered.steering("a"):
        loss = steered(input_ids=ids, labels=ids).loss
    loss.backward()
    for name, gradient in want[1].items():
        assert torch.equal(steered.get_parameter(name).grad, gradient), name


def without_dropout(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
    for name in ("attn_dropout", "attention_dropout"):
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, 0.0)


@pytest.mark.parametrize("attach_first", [True, False])
def test_two_checkpointed_forwards_before_one_backward(attach_first: bool) -> None:
    adapter, plain = query_shift("head_out[1]"), tiny_llama()
    settings = {"use_reentrant": False}
    steered = tiny_llama()
    if attach_first:
        steered = steer_tiny(steered, adapter)
    checkpointed(plain, settings), checkpointed(steered, settings)
    steered = steered if attach_first else steer_tiny(steered, adapter)
    one, two = some_prompts(seed=1), some_prompts(seed=2)

    # The plain hook is run again in the backward pass, so it can serve one prompt only: compare sums of gradients.
    want: dict[str, torch.Tensor] = {}
    for ids, factor in ((one, 1), (two, 2)):
        plain.zero_grad()
        with reference(plain, adapter, ids):
            (factor * plain(input_ids=ids, labels=ids).loss).backward()
        for name, parameter in plain.named_parameters():
            want[name] = want.get(name, 0) + parameter.grad
    loss = steered(input_ids=one, labels=one).loss + 2 * steered(input_ids=two, labels=two).loss
    loss.backward()
    for name, gradient in want.items():
        torch.testing.assert_close(steered.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("how", ["stored", "recomputed"])
@pytest.mark.parametrize("site", SITES)
def test_lora_training_on_a_steered_model(how: str, site: str) -> None:
    ids, adapter = some_prompts(), query_shift(site)
    torch.manual_seed(0)
    plain = get_peft_model(tiny_llama(), lora_config())
    torch.manual_seed(0)
    steered = get_peft_model(steer_tiny(tiny_llama(), adapter), lora_config())
    losses = []
    for model, steering in ((plain, True), (steered, False)):
        if CHECKPOINTS[how] is not None:
            model.enable_input_require_grads()
        checkpointed(model, CHECKPOINTS[how])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        curve = []
        for _ in range(3):
            with reference(model, adapter, ids) if steering else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3
    trained = [name for name, p in steered.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


class Rows(Dataset):
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index], "unused": self.ids[index]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_a_step(checkpointing: bool, tmp_path: Path) -> None:
    ids, adapter = some_prompts(rows=2), query_shift("head_out[1]")
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, learning_rate=0.1, use_cpu=True,
        report_to=[], gradient_checkpointing=checkpointing, save_strategy="no", logging_steps=1, disable_tqdm=True,
        optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    plain, steered = tiny_llama(), steer_tiny(tiny_llama(), adapter)
    with reference(plain, adapter, ids):
        Trainer(model=plain, args=settings, train_dataset=Rows(ids)).train()
    trainer = Trainer(model=steered, args=settings, train_dataset=Rows(ids))
    trainer.train()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(steered.get_parameter(name), parameter, msg=name)
    assert not torch.equal(plain.lm_head.weight, tiny_llama().lm_head.weight)
    trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("steering*"))
    # After training, generation is steered as before.
    plain.eval(), steered.eval()
    steered.load_state_dict(plain.state_dict())
    with reference(plain, adapter, ids):
        want = greedy(plain, ids)
    assert torch.equal(greedy(steered, ids), want)
