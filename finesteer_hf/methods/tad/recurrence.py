"""Confidence of a token that uses earlier tokens: TAD, "Unconditional Truthfulness" (arXiv 2408.10692).

A token's own confidence p_i is conditional on the earlier tokens being right. The unconditional one is regressed from
it, from the attention to earlier tokens, and from their conditional and unconditional confidences:

    u_i = clip(b + w p_i + sum_n (a_n . A(i, i - n) + c_n p_(i-n) + r_n u_(i-n) + s_n p_i u_(i-n)), 0, 1),   u_0 = p_0

n runs from 1 to N over those earlier tokens that are judged too. The features, the target (the quality of the token's
answer) and the two stages of the fit are those of the authors' code. There p_i is the token's probability under the
model, and A are the weights of all heads. Here p_i is read from the token's state, and A are those of the heads up to
the judged block: more is not known when the token is steered, see `finesteer_hf.methods.tad.method`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


# Columns to remember beyond the N needed: as many as a step of `generate` can take back at once.
REACH = 256


@dataclass(frozen=True)
class Weights:
    """The regression, all float32.

    Attributes:
        bias, own: b and w, `[1]`.
        previous: c_n, r_n and s_n, `[N, 3]`.
        attention: a_n, `[N, weights]`; no columns if attention is not a feature.
    """

    bias: torch.Tensor
    own: torch.Tensor
    previous: torch.Tensor
    attention: torch.Tensor


def unconditional(
    own: torch.Tensor,
    judged: torch.Tensor,
    attention: torch.Tensor | None,
    weights: Weights,
    past: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """u of consecutive tokens; 0 at those that are not judged.

    Args:
        own: p, `[rows, tokens]` float32.
        judged: bool `[rows, tokens]`: tokens that have a score, without gaps in a row.
        attention: A, `[rows, tokens, N, weights]`, nearest token first; None if it is not a feature.
        weights: the regression.
        past: p, u and `judged` of the N earlier columns, `[rows, N]`; None if there are none.
    """
    reach, rows = len(weights.previous), len(own)
    if past is None:
        zeros = own.new_zeros(rows, reach)
        past = (zeros, zeros, torch.zeros_like(zeros, dtype=torch.bool))
    known = torch.cat([past[2], judged], dim=1)
    p = torch.cat([past[0], own], dim=1)
    u = list(past[1].unbind(1))
    c, r, s = weights.previous.unbind(1)
    pulls = None
    if attention is not None:
        pulls = (attention * weights.attention).sum(-1)
    for token in range(own.shape[1]):
        mine, behind = own[:, token], slice(token, token + reach)
        before = known[:, behind].flip(1)
        terms = c * p[:, behind].flip(1) + (r + s * mine[:, None]) * torch.stack(u[behind], dim=1).flip(1)
        if pulls is not None:
            terms = terms + pulls[:, token]
        regressed = weights.bias + weights.own * mine + torch.where(before, terms, 0.0).sum(1)
        score = torch.where(before[:, 0], regressed.clamp(0, 1), mine)
        u.append(torch.where(judged[:, token], score, 0.0))
    return torch.stack(u[reach:], dim=1)


class Recurrence:
    """A call's memory of earlier columns: p, u and whether a column is judged.

    Columns are absolute, so those that are taken back (rejected drafts) or passed again (no cache) are overwritten.

    Args:
        reach: N.
    """

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.end = 0
        self.kept: tuple[torch.Tensor, ...] = ()

    def before(self, first: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """p, u and `judged` of the N columns before column `first`, `[rows, N]`; unseen ones are not judged."""
        zeros = like.new_zeros(len(like), self.reach)
        empty = (zeros, zeros, torch.zeros_like(zeros, dtype=torch.bool))
        columns = self.kept[0].shape[1] if self.kept else 0
        # Columns that this call did not pass have no score, and earlier ones are ignored.
        seen = max(0, columns - (self.end - first)) if first <= self.end else 0
        self.kept = tuple(values[:, :seen].to(like.device) for values in self.kept)
        self.end = first
        if not seen:
            return empty
        p, u, judged = (
            torch.cat([pad, values], dim=1)[:, -self.reach :] for pad, values in zip(empty, self.kept, strict=True)
        )
        return p, u, judged

    def note(self, p: torch.Tensor, u: torch.Tensor, judged: torch.Tensor) -> None:
        """Store the columns that follow those of `before`."""
        new = (p, u, judged)
        kept = self.kept or tuple(values[:, :0] for values in new)
        self.kept = tuple(torch.cat([a, b], dim=1)[:, -(self.reach + REACH) :] for a, b in zip(kept, new, strict=True))
        self.end += p.shape[1]


# -- fit --------------------------------------------------------------------------------------------------------------
