"""The paper's mixture of steering experts, MoSE (FineSteer, arXiv 2604.15488, Eq. 11-14), trained by gradient."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit
from sklearn.utils.validation import check_is_fitted
from torch import nn

from finesteer_hf.estimators.arrays import (
    ArrayLike,
    Matrix,
    State,
    as_groups,
    as_matrix,
    fraction,
    one_of,
    paired,
    positive,
    run,
)
from finesteer_hf.estimators.experts import (
    calinski_harabasz_curve,
    cluster,
    cluster_means,
    clustering_features,
    expert_weights,
    median_of_criteria,
    unit_length,
)
from finesteer_hf.estimators.linear_algebra import principal_directions


def mose_vector(
    h: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor,
    prototypes: torch.Tensor,
    hidden_weight: torch.Tensor,
    hidden_bias: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor,
    residual_basis: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return v(h) = C alpha(h) + U beta(h) (Eq. 11), beta a one-hidden-layer ReLU network.

    Args:
        h: query states [..., d], any floating dtype.
        router_weight, router_bias: folded routing (Eq. 12), [K, d] and [K].
        prototypes: C^T [K, d].
        hidden_weight, hidden_bias, output_weight, output_bias: of beta (Eq. 13-14), [m, d], [m], [r, m], [r].
        residual_basis: U [d, r], orthonormal.
        weights: alpha(h) [..., K], if already computed.

    Returns:
        [..., d] fp32.
    """
    h = h.float()
    if weights is None:
        weights = expert_weights(h, router_weight, router_bias)
    hidden = torch.relu(nn.functional.linear(h, hidden_weight, hidden_bias))
    coefficients = nn.functional.linear(hidden, output_weight, output_bias)
    return weights @ prototypes + coefficients @ residual_basis.T


class _Unfolded(nn.Module):
    """MoSE in training: separate query, key (and value) projections."""

    def __init__(
        self,
        prototypes: torch.Tensor,
        residual_basis: torch.Tensor,
        key_dim: int,
        hidden_dim: int,
        learn_values: bool,
        official: bool,
    ) -> None:
        super().__init__()
        width, rank = residual_basis.shape
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("residual_basis", residual_basis)
        self.query = nn.Linear(width, key_dim, bias=official)
        self.key = nn.Linear(width, key_dim, bias=official)
        self.value = nn.Linear(width, width, bias=official) if learn_values else None
        if self.value is not None and not official:
            nn.init.eye_(self.value.weight)  # training starts from the prototypes themselves
        self.hidden = nn.Linear(width, hidden_dim)
        self.output = nn.Linear(hidden_dim, rank)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        prototypes: torch.Tensor = self.prototypes  # type: ignore[assignment]
        logits = self.query(h) @ self.key(prototypes).T / math.sqrt(self.query.out_features)
        values = prototypes if self.value is None else self.value(prototypes)
        coefficients = self.output(torch.relu(self.hidden(h)))
        return torch.softmax(logits, dim=-1) @ values + coefficients @ self.residual_basis.T

    @torch.no_grad()
    def folded(self) -> State:
        """Return the arguments of `mose_vector`: W_Q, W_K and C fold into a K x d matrix, W_V and C into another.

        The bias of W_Q becomes the router's; that of W_K is in the keys.
        """
        prototypes: torch.Tensor = self.prototypes  # type: ignore[assignment]
        keys = self.key(prototypes).double() / math.sqrt(self.query.out_features)
        shift = None if self.query.bias is None else (keys @ self.query.bias.double()).float()
        folded = {
            "router_weight": (keys @ self.query.weight.double()).float(),
            "router_bias": torch.zeros(len(prototypes)) if shift is None else shift,
            "prototypes": prototypes if self.value is None else self.value(prototypes),
            "hidden_weight": self.hidden.weight,
            "hidden_bias": self.hidden.bias,
            "output_weight": self.output.weight,
            "output_bias": self.output.bias,
            "residual_basis": self.residual_basis,
        }
        return {name: tensor.detach().clone().contiguous() for name, tensor in folded.items()}


class PaperMoSE(BaseEstimator):
    """MoSE as published: frozen prototypes and residual basis, trained routing and residual network.

    variant="paper": shifts are normalised, reduced to 256 dimensions and clustered; prototypes are the centroids of
    the *normalised* shifts; the residual basis is PCA of the centred raw shifts. variant="orthogonal": raw shifts are
    clustered, prototypes pass a learned value projection, and the residual basis is PCA of what the span of the
    prototypes leaves. A known limit of the paper's form: prototypes have at most unit length and the basis need not
    contain the mean shift, so v may not reach its length; lambda makes up for part of it. `closed_form` has no such
    limit.

    compat="official" trains as the published code does where that differs from the paper: W_Q, W_K and W_V have
    biases, W_V starts at random instead of at the prototypes, the orthogonal variant's K is the median of three
    criteria, and validation rows are drawn singly, ignoring groups.

    The residual network dominates the stored size, 4 d m bytes: 67 MB at d = m = 4096.

    Args:
        num_experts: K, or "auto": the best Calinski-Harabasz index from 4 to 10.
        residual_rank: r.
        key_dim: d_k; None for d.
        hidden_dim: m, width of the residual network; None for d.
        variant: "paper" or "orthogonal".
        compat: None, or "official".
        lr, weight_decay: those of AdamW, full batch, on the element-wise mean squared error.
        epochs: most epochs.
        patience: epochs without a better validation error before stopping; the best epoch's weights are kept.
        val_fraction: validation share of the rows (of the groups, if given).
        max_grad_norm: gradients are clipped to this norm, after the backward pass.
        seed: seed of clustering, split and initial weights.

    Attributes:
        num_experts_, labels_ [M], expert_curve_ (K to Calinski-Harabasz index), centroids_ [K, d], residual_basis_
        [d, r], network_ (unfolded), history_ (dicts: epoch, train, validation), best_epoch_, validation_error_.
    """

    EXPERT_CANDIDATES = tuple(range(4, 11))

    def __init__(
        self,
        num_experts: int | str = "auto",
        *,
        residual_rank: int = 10,
        key_dim: int | None = None,
        hidden_dim: int | None = None,
        variant: str = "paper",
        compat: str | None = None,
        lr: float = 5e-4,
        weight_decay: float = 1e-5,
        epochs: int = 100,
        patience: int = 8,
        val_fraction: float = 0.1,
        max_grad_norm: float = 1.0,
        seed: int = 42,
    ) -> None:
        self.num_experts = num_experts
        self.residual_rank = residual_rank
        self.key_dim = key_dim
        self.hidden_dim = hidden_dim
        self.variant = variant
        self.compat = compat
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.patience = patience
        self.val_fraction = val_fraction
        self.max_grad_norm = max_grad_norm
        self.seed = seed

    def fit(self, states: ArrayLike, shifts: ArrayLike, groups: Any = None) -> PaperMoSE:
        """Learn v from query states [M, d] and shifts delta = h_plus - h_minus [M, d].

        Args:
            groups: [M] labels; the validation rows are whole groups.

        Raises:
            ValueError: for bad rows, more experts than rows, and a residual rank or another parameter out of range.
        """
        h, delta = paired(states, shifts)
        labels = as_groups(groups, len(h))
        self._check(len(h), delta.shape[1])
        self._cluster(delta)
        self._find_residual_basis(delta)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network_ = _Unfolded(
                torch.from_numpy(self.centroids_),
                torch.from_numpy(self.residual_basis_),
                self.key_dim or h.shape[1],
                self.hidden_dim or h.shape[1],
                learn_values=self.variant == "orthogonal",
                official=self.compat == "official",
            )
        self._train(torch.from_numpy(h).float(), torch.from_numpy(delta).float(), *self._split(len(h), labels))
        self._state = self.network_.folded()
        return self

    def _check(self, rows: int, width: int) -> None:
        one_of(self.variant, ("paper", "orthogonal"), "variant")
        if self.compat is not None:
            one_of(self.compat, ("official",), "compat")
        positive(self.lr, "lr")
        positive(self.max_grad_norm, "max_grad_norm")
        fraction(self.val_fraction, "val_fraction")
        for name in ("epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.num_experts != "auto" and not 1 <= int(self.num_experts) <= rows:
            raise ValueError(f"num_experts={self.num_experts} must be between 1 and the number of rows, {rows}.")
        if not 1 <= self.residual_rank <= min(rows - 1, width):
            raise ValueError(
                f"residual_rank={self.residual_rank} must be between 1 and min(rows - 1, d) = {min(rows - 1, width)}."
            )

    def _cluster(self, delta: Matrix) -> None:
        paper = self.variant == "paper"
        features = clustering_features(delta, normalise=paper, seed=self.seed)
        self.expert_curve_: dict[int, float] = {}
        if self.num_experts == "auto":
            self.expert_curve_ = calinski_harabasz_curve(features, self.EXPERT_CANDIDATES, seed=self.seed)
            self.num_experts_ = max(self.expert_curve_, key=lambda count: self.expert_curve_[count])
            if self.compat == "official" and not paper:
                self.num_experts_ = median_of_criteria(features, self.EXPERT_CANDIDATES, seed=self.seed)
        else:
            self.num_experts_ = int(self.num_experts)
        self.labels_ = cluster(features, self.num_experts_, seed=self.seed)
        self.centroids_ = cluster_means(unit_length(delta) if paper else delta, self.labels_).astype(np.float32)

    def _find_residual_basis(self, delta: Matrix) -> None:
        rest = delta
        if self.variant == "orthogonal":
            span, _ = np.linalg.qr(self.centroids_.astype(np.float64).T)
            rest = delta - (delta @ span) @ span.T
        _, directions = principal_directions(rest - rest.mean(axis=0), self.residual_rank, self.seed)
        if directions.shape[1] < self.residual_rank:
            raise ValueError(
                f"residual_rank={self.residual_rank}, but the shifts leave only {directions.shape[1]} directions."
            )
        self.residual_basis_ = np.ascontiguousarray(directions, dtype=np.float32)

    def _split(self, rows: int, groups: NDArray[Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.compat == "official":
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed))
            held_out = max(1, round(self.val_fraction * rows))
            return order[held_out:], order[:held_out]
        kind = ShuffleSplit if groups is None else GroupShuffleSplit
        splitter = kind(1, test_size=self.val_fraction, random_state=self.seed)
        train, validation = next(iter(splitter.split(np.empty((rows, 1)), groups=groups)))
        return torch.from_numpy(train), torch.from_numpy(validation)

    def _train(self, h: torch.Tensor, delta: torch.Tensor, train: torch.Tensor, validation: torch.Tensor) -> None:
        network = self.network_
        optimiser = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        self.history_: list[dict[str, float]] = []
        self.validation_error_, self.best_epoch_ = math.inf, 0
        best: dict[str, Any] = {}
        least = 1e-8 if self.compat == "official" else 0.0
        for epoch in range(1, self.epochs + 1):
            optimiser.zero_grad()
            loss = nn.functional.mse_loss(network(h[train]), delta[train])
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), self.max_grad_norm)
            optimiser.step()
            with torch.no_grad():
                error = float(nn.functional.mse_loss(network(h[validation]), delta[validation]))
            self.history_.append({"epoch": epoch, "train": float(loss.detach()), "validation": error})
            if error < self.validation_error_ - least:
                self.validation_error_, self.best_epoch_ = error, epoch
                best = copy.deepcopy(network.state_dict())
            elif epoch - self.best_epoch_ >= self.patience:
                break
        if not best:
            raise ValueError(f"training diverged: the validation error was never finite. Lower lr={self.lr:g}.")
        network.load_state_dict(best)

    def predict(self, states: ArrayLike) -> NDArray[np.float32]:
        """Return v of states [B, d]: [B, d] fp32."""
        check_is_fitted(self, "network_")
        checked = as_matrix(states, "states", min_rows=1, width=self.centroids_.shape[1])
        return run(mose_vector, checked, self.state())

    def state(self) -> State:
        """Return the arguments of `mose_vector`."""
        check_is_fitted(self, "network_")
        return dict(self._state)
