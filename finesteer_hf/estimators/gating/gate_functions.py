"""Gates at run time: from a score to a dose g in [0, 1], as functions of tensors."""

from __future__ import annotations

import torch


def quantile_gate(
    score: torch.Tensor,
    threshold: torch.Tensor,
    calibration_scores: torch.Tensor,
    epsilon: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Return g = 1 if s >= tau else (F(s) / eps)^gamma, F the empirical CDF of the IR scores (Eq. 8).

    Args:
        score: [...] fp32.
        threshold: tau [].
        calibration_scores: sorted IR scores [n].
        epsilon, gamma: [].

    Returns:
        [...] fp32 in [0, 1].
    """
    below = torch.searchsorted(calibration_scores, score.contiguous(), right=True)
    share = below / calibration_scores.numel()
    return torch.where(score >= threshold, 1.0, (share / epsilon).clamp(max=1.0) ** gamma)


def logistic_gate(score: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return g = sigmoid(w s + b) (Eq. 9): score [...], weight and bias [] -> [...] fp32 in (0, 1)."""
    return torch.sigmoid(weight * score + bias)


def direct_gate(score: torch.Tensor) -> torch.Tensor:
    """Return g = s, the energy ratio as a soft gate (Eq. 15): [...] -> [...] clamped to [0, 1]."""
    return score.clamp(0.0, 1.0)


def always_gate(score: torch.Tensor) -> torch.Tensor:
    """Return g = 1 for every query: [...] -> [...]."""
    return torch.ones_like(score)


def conformal_gate(
    score: torch.Tensor,
    threshold: torch.Tensor,
    floor: torch.Tensor,
    calibration_scores: torch.Tensor,
    level: torch.Tensor,
    gamma: torch.Tensor,
) -> torch.Tensor:
    """Return g = min(1, (p(s) / level)^gamma), p(s) = (1 + #{calibration <= s}) / (n + 1), and exactly 0 below
    `floor`.

    Args:
        score: [...] fp32.
        threshold: g is 1 from this score on, []; -inf to always fire.
        floor: g is 0 below this score, [].
        calibration_scores: sorted scores [n] of IR rows that the score has not seen.
        level, gamma: [].

    Returns:
        [...] fp32 in [0, 1].
    """
    below = torch.searchsorted(calibration_scores, score.contiguous(), right=True)
    p_value = (1 + below) / (calibration_scores.numel() + 1)
    soft = (p_value / level).clamp(max=1.0) ** gamma
    return torch.where(score >= threshold, 1.0, torch.where(score >= floor, soft, 0.0))
