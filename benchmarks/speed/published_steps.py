"""The steps of FineSteer's released code, re-created: how it reads states and what it trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from finesteer_hf.estimators import IntervenedSubspace, PaperMoSE, QuantileGate
from finesteer_hf.fitting.data.encoding import EncodedRow


@torch.no_grad()
def published_capture(model: Any, rows: Sequence[EncodedRow], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and shifts: three passes a record, batch 1, every hidden state and the logits computed."""
    queries, shifts = [], []
    for row in rows:
        found = []
        for passage in (row.prompt, row.chosen, row.rejected):
            out = model(input_ids=torch.tensor([passage.ids]), output_hidden_states=True)
            hidden = out.hidden_states[layer + 1][0].float()
            found.append(hidden[-1] if passage.answer_start is None else hidden[passage.answer_start :].mean(0))
        queries.append(found[0].numpy())
        shifts.append((found[1] - found[2]).numpy())
    return np.stack(queries), np.stack(shifts)


def published_fit(queries: np.ndarray, shifts: np.ndarray) -> tuple[PaperMoSE, float]:
    """Gate and experts; returns the experts and the size of all parameters in MB of fp32."""
    rank = min(128, len(queries) - 1, queries.shape[1])
    subspace = IntervenedSubspace(rank, max_fraction=0.999).fit(queries)
    QuantileGate(0.1).fit(subspace.score_samples(queries))
    experts = PaperMoSE(compat="official", seed=42).fit(queries, shifts)
    # The released checkpoint holds the query and key maps at full width, not folded.
    width = queries.shape[1]
    unfolded = sum(tensor.numel() for tensor in experts.state().values()) + 2 * width * (width + 1)
    return experts, (unfolded + width * (rank + 1)) * 4 / 1e6
