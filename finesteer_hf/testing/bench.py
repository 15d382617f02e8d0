"""A steered toy model with prompts, and a plain way to generate with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finesteer_hf.testing.toy import toy_general_prompts, toy_preferences, toy_tokenizer


NEW_TOKENS = 8
# The checks use four rows of a batch.
FEWEST_PROMPTS = 4
LARGEST_SCALE = 64


@dataclass
class Bench:
    """The model and prompts of the checks.

    Attributes:
        model: steered, with an active adapter named `a`.
        prompts: token ids of prompts of different lengths, `[tokens]` each.
        scale: a run-time scale at which steering changes the text of at least two prompts.
        expected: new tokens of each prompt alone, steered at that scale.
        unsteered: the same without steering.
    """

    model: Any
    prompts: list[torch.Tensor]
    scale: float
    expected: list[list[int]]
    unsteered: list[list[int]]

    @classmethod
    def of(cls, model: Any, prompts: Sequence[Sequence[int] | torch.Tensor] | None = None) -> Bench:
        """Find a scale at which steering changes the prompts' answers.

        Args:
            model: steered, with an active adapter named `a`.
            prompts: token ids of at least four prompts, not all of one length; None for prompts of the toy data, see
                `toy_prompts`.

        Raises:
            ValueError: if there are too few prompts, if they are all of one length, or if an id is not in the vocabulary.
            AssertionError: if the gate is shut on all prompts, or if steering changes the text of fewer than two of
                them at any scale: no check could fail then.
        """
        bench = cls(model, toy_prompts(model) if prompts is None else _on_device(prompts, model), 1.0, [], [])
        rows = range(len(bench.prompts))
        gates = bench.gates()
        if gates and not any(gates):
            raise AssertionError(
                "the gate is shut on all of these prompts: give prompts=..., token ids of prompts that the method steers"
            )
        bench.unsteered = [bench.alone(i, steering=None) for i in rows]
        while bench.scale <= LARGEST_SCALE:
            bench.expected = [bench.alone(i) for i in rows]
            if sum(a != b for a, b in zip(bench.expected, bench.unsteered, strict=True)) >= 2:
                return bench
            bench.scale *= 2
        gate = f" (the gate is open on {sum(map(bool, gates))} of them)" if gates else ""
        raise AssertionError(
            f"steering changes the text of fewer than two of {len(rows)} prompts{gate}, even at scale {LARGEST_SCALE}"
        )

    def gates(self) -> list[float]:
        """Each prompt's gate from `output_steering`; empty for a method that records none."""
        found: dict[int, float] = {}
        # Prompts of one length form a batch without pads.
        for length in {len(prompt) for prompt in self.prompts}:
            rows = [i for i, prompt in enumerate(self.prompts) if len(prompt) == length]
            settings = {"max_new_tokens": 1, "output_steering": True, "return_dict_in_generate": True}
            record = self.model.generate(**self.batch(rows), do_sample=False, **settings).steering.get("a", {})
            found |= zip(rows, record["gate"].tolist(), strict=True) if "gate" in record else {}
        return [found[i] for i in sorted(found)]

    def alone(self, index: int, **kwargs: Any) -> list[int]:
        """New tokens of one prompt alone."""
        return self.generate([index], **kwargs)[0]

    def batch(self, indices: list[int], side: str = "left") -> dict[str, torch.Tensor]:
        """Prompts as a padded batch."""
        rows = [self.prompts[i] for i in indices]
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
            ids[number, where], mask[number, where] = row, 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def generate(self, indices: list[int], **kwargs: Any) -> list[list[int]]:
        """New tokens of a batch, greedy unless `kwargs` say otherwise."""
        inputs = kwargs.pop("inputs", None) or self.batch(indices)
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "steering_scale": self.scale, **kwargs}
        if settings.get("steering", "") is None:
            settings.pop("steering_scale")
        out = self.model.generate(**inputs, **settings)
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return [row[width:].tolist() for row in sequences]


def toy_prompts(model: Any) -> list[torch.Tensor]:
    """Four prompts of the toy data that the method was fitted on, of different lengths if possible.

    The gate is open on the first three and shut on the last one, if there are such rows. Without a gate the first
    three are from `toy_preferences` and the last one from `toy_general_prompts`.

    Returns:
        Token ids, int64 `[tokens]` each, on the model's device.
    """
    rows, general = toy_preferences(), toy_general_prompts()
    tokenizer = toy_tokenizer()
    ids = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in [*rows, *general]]
    bench = Bench(model, _on_device(ids, model), 1.0, [], [])
    gates = bench.gates() or [1.0] * len(rows) + [0.0] * len(general)
    left, picked = list(range(len(ids))), list[int]()
    for wanted in (True, True, True, False):
        lengths = {len(ids[i]) for i in picked}
        picked.append(min(left, key=lambda i: (bool(gates[i]) != wanted, len(ids[i]) in lengths)))
        left.remove(picked[-1])
    return [bench.prompts[i] for i in picked]


def _on_device(prompts: Sequence[Sequence[int] | torch.Tensor], model: Any) -> list[torch.Tensor]:
    """Prompts as int64 `[tokens]` on a model's device; raises as `Bench.of`."""
    rows = [torch.as_tensor(prompt, dtype=torch.long).to(model.device) for prompt in prompts]
    shapes = [tuple(row.shape) for row in rows]
    if (
        len(rows) < FEWEST_PROMPTS
        or len(set(shapes)) == 1
        or not all(len(shape) == 1 and shape[0] for shape in shapes)
    ):
        raise ValueError(
            f"prompts must be token ids of at least {FEWEST_PROMPTS} prompts, `[tokens]` each and not all of one length; "
            f"got {len(rows)} of shapes {shapes}."
        )
    size = model.config.get_text_config().vocab_size
    odd = [i for i, row in enumerate(rows) if int(row.min()) < 0 or int(row.max()) >= size]
    if odd:
        raise ValueError(f"prompts {odd} have ids outside the model's vocabulary of {size} tokens.")
    return rows
