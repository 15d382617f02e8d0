"""Answers under teacher forcing by hand: one text at a time, whole and unpadded, steered with plain hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from finesteer_hf import SteeringProcessor
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.processors import Decision, Positions, QueryStates
from finesteer_hf.sites import Site, TextTower


SITE = Site("resid_post", 1)
VECTOR = torch.linspace(-1, 1, 32)

#: What becomes of a stream `[1, tokens, width]`.
Move = Callable[[torch.Tensor], torch.Tensor]


class SignedVector(SteeringProcessor):
    """The vector, with a sign that each query decides."""

    reads = writes = (SITE,)

    def __init__(self, strength: float, positions: Positions = "all") -> None:
        self.strength, self.positions = strength, positions

    def decide(self, queries: QueryStates) -> Decision:
        return Decision({SITE: queries[SITE][:, :1].sign() * VECTOR})


class SignedAnswers(SignedVector):
    """The same from the query on."""

    def __init__(self, strength: float) -> None:
        super().__init__(strength, "generated")


@contextlib.contextmanager
def moved(model: Any, moves: Mapping[Site, Move]) -> Iterator[None]:
    """Change the streams at some sites inside a block."""
    tower, handles = TextTower(model), []

    def hooks(site: Site, move: Move) -> Any:
        def after(module: Any, args: Any, output: Any) -> Any:
            return (move(output[0]), *output[1:]) if isinstance(output, tuple) else move(output)

        def before(module: Any, args: Any) -> Any:
            return (move(args[0]), *args[1:])

        if site.kind == "resid_post":
            return tower.layers[site.layer].register_forward_hook(after)
        module = tower.layers[site.layer] if site.kind == "resid_pre" else tower.projection(site)
        return module.register_forward_pre_hook(before)

    try:
        handles += [hooks(site, move) for site, move in moves.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()


def added(passage: Passage, vector: torch.Tensor, positions: Positions = "generated") -> Move:
    """Adds a vector to a text's tokens: to all, or from its prompt's last on."""
    first = int(passage.answer_start or 0) - 1 if positions == "generated" else 0

    def move(hidden: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(hidden.shape[1])[:, None]
        return hidden + torch.where(columns >= first, vector, torch.zeros(()))

    return move


def log_probs(model: Any, passage: Passage, moves: Mapping[Site, Move] | None = None) -> torch.Tensor:
    """Log-probabilities after each token: `[tokens, vocabulary]`."""
    with moved(model, moves or {}):
        return model(input_ids=torch.tensor([passage.ids])).logits[0].float().log_softmax(-1)


def of_answer(log_probs: torch.Tensor, passage: Passage) -> torch.Tensor:
    """Log-probability of each of an answer's tokens, `[answer]`."""
    start = int(passage.answer_start or 0)
    return torch.stack([log_probs[i - 1, passage.ids[i]] for i in range(start, len(passage.ids))])


@torch.no_grad()
def by_hand(model: Any, passage: Passage, strength: float, positions: Positions = "all") -> torch.Tensor:
    """`log_probs` under `SignedVector`."""

    def steer(hidden: torch.Tensor) -> torch.Tensor:
        sign = hidden[0, int(passage.answer_start or 0) - 1, 0].sign()
        return added(passage, strength * sign * VECTOR, positions)(hidden)

    return log_probs(model, passage, {SITE: steer} if strength else None)
