"""Train the playground's model from a seed: `python -m finesteer_hf.playground.train --out DIR`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finesteer_hf.playground.contents import World
from finesteer_hf.playground.corpus import Corpus, Encoder, batches
from finesteer_hf.playground.figures import behaviour_figures
from finesteer_hf.playground.tokenizer import build_tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 128, layers: int = 6) -> LlamaForCausalLM:
    """Build an untrained Llama for `tokenizer` from torch's current seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    world: World,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train a tokenizer and a model on a world: loss on the answer tokens only, AdamW, warm-up, then cosine to zero.

    Weight decay and the wide initialisation keep the residual stream small, so that the later blocks' outputs are a
    large part of it. If token identity dominates the stream, steering breaks the text before it changes the answer, at
    any strength.

    Args:
        report: Called with the step number and the loss, every tenth step and after the last.

    Returns:
        The model in evaluation mode, float32, and its tokenizer.
    """
    corpus = Corpus(world, seed)
    tokenizer = build_tokenizer(corpus.texts())
    torch.manual_seed(seed)
    model = build_model(tokenizer).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        learning_rate,
        total_steps=steps,
        pct_start=0.06,
        div_factor=25,
        final_div_factor=1e4,
        cycle_momentum=False,
    )
    for step, (ids, labels) in enumerate(batches(corpus, Encoder(tokenizer), batch_size, steps)):
        # Padding comes after every answer, so causal attention needs no mask.
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        answered = targets != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[answered]), targets[answered])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9 or step + 1 == steps:
            report(step + 1, loss.item())
    return model.eval(), tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in fp16; the config says float32, so that a plain `from_pretrained` computes in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})


def main(
    out: Annotated[Path, typer.Option(help="Folder for the model, the tokenizer and figures.json.")],
    seed: Annotated[int, typer.Option(help="Seed of the world, the weights and the order of texts.")] = 0,
    steps: Annotated[int, typer.Option(min=20, help="Optimiser steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    figures: Annotated[bool, typer.Option(help="Measure the trained model's behaviour and print it.")] = True,
) -> None:
    """Train the playground's model, save it, and print its figures."""
    torch.set_num_threads(threads)
    console = Console()
    world = World(seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"), console=console) as bar:
        task = bar.add_task("training", total=steps, loss=float("nan"))

        def report(step: int, loss: float) -> None:
            bar.update(task, completed=step, loss=loss)
            if not console.is_terminal and step % 100 == 0:
                console.print(f"step {step} of {steps}, loss {loss:.3f}")

        model, tokenizer = train(
            world, seed=seed, steps=steps, batch_size=batch_size, learning_rate=learning_rate, report=report
        )
    save(model, tokenizer, out)
    console.print(f"saved {sum(p.numel() for p in model.parameters()):,} parameters to {out}")
    if figures:
        measured = behaviour_figures(LlamaForCausalLM.from_pretrained(out), tokenizer, world)
        (out / "figures.json").write_text(json.dumps(measured, indent=2) + "\n")
        console.print_json(data=measured)


if __name__ == "__main__":
    typer.run(main)
