"""LoRA on the rows that steering is fitted on, trained by TRL: what a hundred times the parameters reach."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import torch


@dataclasses.dataclass(frozen=True)
class Training:
    """Plain small settings.

    Attributes:
        rank: of LoRA, on all linear layers.
        epochs: over the rows.
        rows: of a batch.
        learning_rate: of AdamW, falling linearly.
        beta: of DPO.
    """

    rank: int = 8
    epochs: int = 2
    rows: int = 8
    learning_rate: float = 1e-4
    beta: float = 0.1


def train(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    how: Literal["dpo", "sft"],
    folder: Path,
    settings: Training,
) -> tuple[Any, dict[str, Any]]:
    """Train LoRA, or load it if the folder has it.

    Args:
        model: the base; becomes part of the result.
        tokenizer: its tokenizer.
        rows: preference rows; `sft` takes the chosen answers alone.
        how: the loss.
        folder: of the LoRA.
        settings: of the training.

    Returns:
        The PEFT model in evaluation mode; and what is told of the training.

    Raises:
        ImportError: if TRL is not installed.
    """
    from peft import LoraConfig, PeftModel

    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(model, str(folder)).eval(), {"seconds": {}, "reused": True}
    try:
        import datasets
        import trl
    except ImportError as error:
        raise ImportError("LoRA is trained by TRL, which is not installed: pip install -e '.[train]'.") from error
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "output_dir": str(folder.with_name(folder.name + "-training")),
        "per_device_train_batch_size": settings.rows,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": [],
        "seed": 0,
    }
    lora = LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    columns = ("prompt", "chosen", "rejected") if how == "dpo" else ("prompt", "completion")
    plain = [{"completion": row["chosen"], **row} for row in rows]
    data = datasets.Dataset.from_list([{name: row[name] for name in columns} for row in plain])
    if how == "dpo":
        trainer: Any = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(beta=settings.beta, **common),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora,
        )
    else:
        trainer = trl.SFTTrainer(
            model, args=trl.SFTConfig(**common), train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trained = trainer.model
    trained.save_pretrained(str(folder))
    facts = {
        "seconds": {"fit": round(seconds, 1)},
        "parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "settings": dataclasses.asdict(settings),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    return trained.eval(), facts
