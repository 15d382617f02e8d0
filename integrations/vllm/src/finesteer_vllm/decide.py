"""What an adapter adds for a query: score, gate and vector, as tensor functions of what its files hold.

No branch depends on a value and nothing leaves the device, so that all of it can be captured in a CUDA graph. The formulas
are those of finesteer_hf, which a server need not have; the tests hold them to its own decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


Tensors = Mapping[str, torch.Tensor]
Formula = Callable[[torch.Tensor, Tensors], torch.Tensor]

TINY = torch.finfo(torch.float32).tiny


def decide(
    h: torch.Tensor, tensors: Tensors, *, vector: str, score: str | None, gate: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decide once a query what is added, and how much of it.

    Args:
        h: `[rows, hidden_size]` float32, states of the queries' last tokens, unsteered.
        tensors: of the adapter's file, float32, on the device of `h`.
        vector: one of `VECTORS`.
        score: one of `SCORES`; None where the gate is always open.
        gate: one of `GATES`; None where it is always open.

    Returns:
        The vectors of all write layers side by side, `[rows, layers * hidden_size]`, and the gate in [0, 1], `[rows]`,
        None where it is always open; both float32.
    """
    added = VECTORS[vector](h, tensors)
    if score is None or gate is None:
        return added, None
    return added, GATES[gate](SCORES[score](h, tensors), tensors)


def state_score(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """The log-odds w . h + b of a linear classifier, `[rows]`."""
    return h @ tensors["gate.weight"] + tensors["gate.bias"]


def energy_ratio(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """The share of |h - mean|^2 that lies in a subspace, `[rows]` in [0, 1]."""
    deviation, _ = _scaled_deviation(h, tensors["gate.mean"])
    inside = (deviation @ tensors["gate.basis"]).square().sum(dim=-1)
    return (inside / deviation.square().sum(dim=-1).clamp_min(TINY)).clamp(0.0, 1.0)


def monitoring_p_value(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """The smaller of two two-sided p-values, of the distance within a subspace and from it, doubled; `[rows]`."""
    deviation, scale = _scaled_deviation(h, tensors["gate.mean"])
    basis, variances = tensors["gate.basis"], tensors["gate.variances"]
    along = deviation @ basis
    away = deviation - along @ basis.T
    log_scale = 2.0 * scale.squeeze(-1).log()
    largest = variances.amax()
    within = (along.square() / (variances / largest)).sum(dim=-1).clamp_min(TINY).log() - largest.log() + log_scale
    outside = away.square().sum(dim=-1).clamp_min(TINY).log() + log_scale
    smaller = torch.minimum(
        _two_sided(within, tensors["gate.t2_reference"]), _two_sided(outside, tensors["gate.q_reference"])
    )
    return (2.0 * smaller).clamp(max=1.0)


def stepped_gate(score: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Look up the dose between the scores at which it steps, counted from above: NaN gets the lowest dose."""
    return tensors["gate.doses"].take(torch.searchsorted(tensors["gate.steps"], -score))


def logistic_gate(score: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """sigmoid(slope s + intercept)."""
    return torch.sigmoid(tensors["gate.slope"] * score + tensors["gate.intercept"])


def score_as_gate(score: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """The score itself, within [0, 1]."""
    return score.clamp(0.0, 1.0)


def low_rank_vector(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """bias + up^T down^T (h - mean)."""
    centred = h - tensors["residual.mean"]
    return (centred @ tensors["residual.down"]) @ tensors["residual.up"] + tensors["residual.bias"]


def mixture_vector(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Routed prototypes plus the low-rank map."""
    return _routed(h, tensors) + low_rank_vector(h, tensors)


def network_vector(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Routed prototypes plus a residual whose coefficients a network of one hidden layer gives."""
    hidden = torch.relu(
        torch.nn.functional.linear(h, tensors["residual.hidden_weight"], tensors["residual.hidden_bias"])
    )
    coefficients = torch.nn.functional.linear(
        hidden, tensors["residual.output_weight"], tensors["residual.output_bias"]
    )
    return _routed(h, tensors) + coefficients @ tensors["residual.basis"].T


def _routed(h: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    weights = torch.softmax(h @ tensors["router.weight"].T + tensors["router.bias"], dim=-1)
    return weights @ tensors["experts.prototypes"]


def _scaled_deviation(h: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h - mean with entries of at most 1, whose squares cannot overflow, and what they were divided by."""
    deviation = h - mean
    scale = deviation.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    return deviation / scale, scale


def _two_sided(statistic: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Conformal p-value within the reference, falling with the distance beyond it."""
    count = reference.numel()
    below = torch.searchsorted(reference, statistic, right=True)
    above = count - torch.searchsorted(reference, statistic, right=False)
    p_value = (2.0 * (1 + torch.minimum(below, above)) / (count + 1)).clamp(max=1.0)
    beyond = (reference[0] - statistic).clamp_min(0.0) + (statistic - reference[-1]).clamp_min(0.0)
    return p_value / (1.0 + beyond / (reference[-1] - reference[0]).clamp_min(1e-6))


SCORES: dict[str, Formula] = {"state": state_score, "ser": energy_ratio, "t2q": monitoring_p_value}
GATES: dict[str, Formula] = {"stepped": stepped_gate, "logistic": logistic_gate, "ser": score_as_gate}
VECTORS: dict[str, Formula] = {
    "reduced_rank": low_rank_vector,
    "mixture": mixture_vector,
    "paper": network_vector,
}
