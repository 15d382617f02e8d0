"""The toy model's preference rows as training sees them, and its answers' log-probabilities written out."""

from __future__ import annotations

import functools

import numpy as np
import torch

from finesteer_hf.fitting.answers import run_answers
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.method_api import ModelInfo
from finesteer_hf.methods._shared.preference_training import PairScores
from finesteer_hf.testing import toy_model, toy_preferences, toy_tokenizer


WIDTH = 32


class ToyData:
    """`FitData` of the toy model's first rows, as far as training asks; answers run in batches, as in a fit."""

    def __init__(self, rows=6):
        self.model = toy_model()
        self.texts = toy_preferences(rows)
        self.info, self.seed = ModelInfo(3, WIDTH, 4, 8, 54), 0
        self.tokenizer = toy_tokenizer()

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompts(self, part):
        return np.arange(len(self.texts))

    def tokens(self, text, part):
        return [np.array(self.ids(row[text])) for row in self.texts]

    def answers(self, text, part, rows, *, steering=None, sites=()):
        passages = [self.passage(self.texts[row], text) for row in rows]
        return run_answers(self.model, passages, steering, sites)

    def passage(self, row, side):
        return Passage(tuple(self.ids(row["prompt"] + row[side])), len(self.ids(row["prompt"])))


@functools.cache
def toy_data():
    return ToyData()


def scores(seed, rows=5):
    """Random scores, as a model might give them."""
    rng = np.random.default_rng(seed)
    tokens = [torch.tensor(rng.integers(1, 9, rows), dtype=torch.float32) for _ in range(2)]
    return PairScores(*(torch.tensor(-20 * rng.random(rows), dtype=torch.float32) for _ in range(2)), *tokens)


def margins(vector, layer, factor, rows):
    """Written out with a plain hook on every token: mean of log p(chosen) - log p(rejected), in nats."""
    model, tokenizer = toy_model(), toy_tokenizer()
    model.model.layers[layer].register_forward_hook(lambda module, args, output: output + factor * vector)
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"], add_special_tokens=False).input_ids)
        total = {}
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side], add_special_tokens=False).input_ids
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total[side] = sum(float(log_probs[i - 1, ids[i]]) for i in range(start, len(ids)))
        found.append(total["chosen"] - total["rejected"])
    return float(np.mean(found))
