"""MoSE against Eq. 11-14 read literally, its folding, and the traps of its training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import calinski_harabasz_score, silhouette_score
from torch import nn

from finesteer_hf.estimators import PaperMoSE
from finesteer_hf.estimators.experts import calinski_harabasz_curve, median_of_criteria


def clustered(rows: int = 120, width: int = 24, modes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mode = rng.integers(modes, size=rows)
    centres = rng.normal(size=(modes, width)) * 3
    states = rng.normal(size=(modes, width))[mode] + 0.3 * rng.normal(size=(rows, width))
    return states, centres[mode] * rng.uniform(0.5, 2, size=(rows, 1)) + 0.5 * rng.normal(size=(rows, width))


@pytest.mark.parametrize("variant", ["paper", "orthogonal"])
@pytest.mark.parametrize(("key_dim", "hidden_dim"), [(None, None), (7, 5)])
def test_prediction_is_equation_11_to_14_unfolded(variant: str, key_dim: int | None, hidden_dim: int | None) -> None:
    states, shifts = clustered()
    fitted = PaperMoSE(4, residual_rank=3, key_dim=key_dim, hidden_dim=hidden_dim, variant=variant, epochs=20)
    fitted.fit(states, shifts)
    weights = {name: tensor.double().numpy() for name, tensor in fitted.network_.state_dict().items()}
    C, U = fitted.centroids_.astype(float).T, fitted.residual_basis_.astype(float)  # [d, K], [d, r]
    values = weights["value.weight"] @ C if variant == "orthogonal" else C
    expected = []
    for h in states:
        logits = (weights["key.weight"] @ C).T @ (weights["query.weight"] @ h) / np.sqrt(key_dim or 24)  # Eq. 12
        alpha = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        hidden = np.maximum(weights["hidden.weight"] @ h + weights["hidden.bias"], 0)
        beta = weights["output.weight"] @ hidden + weights["output.bias"]  # Eq. 14
        expected.append(values @ alpha + U @ beta)  # Eq. 11
    np.testing.assert_allclose(fitted.predict(states), expected, atol=1e-5)
    with torch.no_grad():
        unfolded = fitted.network_(torch.from_numpy(states).float()).numpy()
    np.testing.assert_allclose(fitted.predict(states), unfolded, atol=1e-5)
    assert fitted.state()["router_weight"].shape == (4, 24)
    assert fitted.state()["hidden_weight"].shape == (hidden_dim or 24, 24)


def test_prototypes_are_centroids_of_unit_shifts_and_the_basis_is_pca_of_raw_ones() -> None:
    states, shifts = clustered()
    fitted = PaperMoSE(4, residual_rank=5, epochs=1).fit(states, shifts)
    unit = shifts / np.linalg.norm(shifts, axis=1, keepdims=True)
    labels = KMeans(4, n_init=20, random_state=42).fit_predict(PCA(24).fit_transform(unit))
    assert {tuple(np.flatnonzero(labels == k)) for k in range(4)} == {
        tuple(np.flatnonzero(fitted.labels_ == k)) for k in range(4)
    }
    for k in range(4):
        np.testing.assert_allclose(fitted.centroids_[k], unit[fitted.labels_ == k].mean(axis=0), atol=1e-6)
    assert (np.linalg.norm(fitted.centroids_, axis=1) <= 1).all()
    components = PCA(5).fit(shifts).components_  # Eq. 13
    np.testing.assert_allclose(np.abs(components @ fitted.residual_basis_), np.eye(5), atol=1e-5)


def test_orthogonal_variant_clusters_raw_shifts_and_leaves_their_span() -> None:
    states, shifts = clustered()
    fitted = PaperMoSE(4, residual_rank=5, variant="orthogonal", epochs=1).fit(states, shifts)
    for k in range(4):
        np.testing.assert_allclose(fitted.centroids_[k], shifts[fitted.labels_ == k].mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(fitted.centroids_ @ fitted.residual_basis_, 0, atol=1e-4)
    np.testing.assert_allclose(fitted.residual_basis_.T @ fitted.residual_basis_, np.eye(5), atol=1e-5)


def published_network(variant: str, centroids: np.ndarray, basis: np.ndarray, width: int, seed: int) -> nn.ModuleDict:
    """The code's layers, made in its order after its seed."""
    torch.manual_seed(seed)
    layers = {"query": nn.Linear(width, width), "key": nn.Linear(width, width)}
    if variant == "orthogonal":
        layers["value"] = nn.Linear(width, width)
    return nn.ModuleDict({**layers, "hidden": nn.Linear(width, width), "output": nn.Linear(width, basis.shape[1])})


@pytest.mark.parametrize("variant", ["paper", "orthogonal"])
def test_official_training_takes_the_codes_steps(variant: str) -> None:
    """Biases, W_V's start, the rows drawn for validation, clipping and the best epoch: the vectors are the same."""
    states, shifts = clustered()
    groups = np.arange(len(states)) // 3
    fitted = PaperMoSE(4, residual_rank=3, variant=variant, compat="official", epochs=12, seed=5)
    fitted.fit(states, shifts, groups)
    C, U = torch.from_numpy(fitted.centroids_), torch.from_numpy(fitted.residual_basis_)
    x, y = torch.from_numpy(states).float(), torch.from_numpy(shifts).float()
    with torch.random.fork_rng():
        net = published_network(variant, fitted.centroids_, fitted.residual_basis_, 24, 5)
        torch.manual_seed(5)
        order = torch.randperm(len(x))

    def forward(h: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(net["query"](h) @ net["key"](C).T / 24**0.5, dim=-1)
        values = net["value"](C) if variant == "orthogonal" else C
        return weights @ values + net["output"](torch.relu(net["hidden"](h))) @ U.T

    validation, train = order[:12], order[12:]
    optimiser = torch.optim.AdamW(net.parameters(), lr=5e-4, weight_decay=1e-5)
    best, kept = np.inf, None
    for _ in range(12):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(forward(x[train]), y[train]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            error = float(torch.nn.functional.mse_loss(forward(x[validation]), y[validation]))
            best, kept = (error, forward(x)) if error < best - 1e-8 else (best, kept)
    assert kept is not None and fitted.validation_error_ == pytest.approx(best, abs=1e-6)
    np.testing.assert_allclose(fitted.predict(states), kept.numpy(), atol=1e-5)
    assert fitted.state()["router_bias"].abs().max() > 0


def test_official_orthogonal_takes_the_median_of_three_criteria() -> None:
    states, shifts = clustered(rows=150, modes=5, seed=3)
    features = PCA(24).fit_transform(shifts)
    found = [KMeans(k, n_init=10, random_state=42).fit(features) for k in range(4, 11)]
    inertia = np.array([one.inertia_ for one in found])
    bend = np.abs(np.diff((inertia - inertia.min()) / np.ptp(inertia), n=2))
    indices = [
        [index(features, one.labels_) for one in found] for index in (silhouette_score, calinski_harabasz_score)
    ]
    choices = [4 + int(bend.argmax()) + 1, *(4 + int(np.argmax(index)) for index in indices)]
    settings = {"residual_rank": 2, "epochs": 1}
    official = PaperMoSE(variant="orthogonal", compat="official", **settings).fit(states, shifts)
    assert official.num_experts_ == int(np.median(choices))
    assert median_of_criteria(features, range(4, 11), seed=42) == int(np.median(choices))
    # The paper's variant keeps to one index, whatever the code's other variant does.
    paper = PaperMoSE(compat="official", **settings).fit(states, shifts)
    assert paper.num_experts_ == max(paper.expert_curve_, key=paper.expert_curve_.get)


def test_the_median_is_not_always_the_best_index() -> None:
    """Few rows in a noisy cloud: the three criteria disagree, and the median is between them."""
    generator = np.random.default_rng(0)
    differing = 0
    for _ in range(6):
        features = generator.normal(size=(40, 5))
        curve = calinski_harabasz_curve(features, range(4, 11))
        differing += median_of_criteria(features, range(4, 11)) != max(curve, key=curve.get)
    assert differing


def test_number_of_experts_is_the_best_calinski_harabasz() -> None:
    states, shifts = clustered(rows=200, modes=6)
    fitted = PaperMoSE(residual_rank=3, epochs=1).fit(states, shifts)
    assert set(fitted.expert_curve_) == set(range(4, 11))
    assert fitted.num_experts_ == 6


def test_training_learns_routing() -> None:
    states, shifts = clustered(rows=300)
    fitted = PaperMoSE(4, residual_rank=5, lr=5e-3).fit(states[:240], shifts[:240])
    constant = np.square(shifts[240:] - shifts[:240].mean(axis=0)).sum()
    assert np.square(shifts[240:] - fitted.predict(states[240:])).sum() < 0.5 * constant


def test_clipping_acts_on_the_gradient_of_the_step() -> None:
    """Clipping before the backward pass would make both runs equal (T17)."""
    states, shifts = clustered()
    options = {"num_experts": 4, "residual_rank": 3, "epochs": 10, "lr": 5e-3}
    free = PaperMoSE(**options).fit(states, shifts).history_
    held = PaperMoSE(**options, max_grad_norm=1e-12, weight_decay=0.0).fit(states, shifts).history_
    assert free[-1]["train"] < 0.98 * free[0]["train"]
    assert held[-1]["train"] == pytest.approx(held[0]["train"], rel=1e-3)


def test_stopping_watches_validation_and_keeps_its_best_epoch() -> None:
    rng = np.random.default_rng(0)
    states, noise = rng.normal(size=(80, 16)), rng.normal(size=(80, 16))
    fitted = PaperMoSE(4, residual_rank=8, lr=1e-2, epochs=100, patience=5).fit(states, noise)
    train = [row["train"] for row in fitted.history_]
    validation = [row["validation"] for row in fitted.history_]
    assert len(validation) < 100
    assert train[-1] < train[0]  # training loss alone would have gone on
    assert fitted.best_epoch_ == int(np.argmin(validation)) + 1 == len(validation) - 5
    assert fitted.validation_error_ == min(validation)
    _, held_out = fitted._split(80, None)
    error = np.square(fitted.predict(states[held_out]) - noise[held_out]).mean()
    assert error == pytest.approx(fitted.validation_error_, rel=1e-4)


def test_validation_rows_are_whole_groups() -> None:
    groups = np.repeat(np.arange(12), 10)
    train, validation = PaperMoSE(val_fraction=0.2)._split(120, groups)
    assert not set(groups[train]) & set(groups[validation])
    states, shifts = clustered()
    assert PaperMoSE(4, residual_rank=2, epochs=1).fit(states, shifts, groups).history_


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    states, shifts = clustered()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second = (PaperMoSE(4, residual_rank=2, epochs=3).fit(states, shifts).state() for _ in range(2))
    assert torch.rand(1) == expected
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0)


def test_bad_input_is_refused() -> None:
    states, shifts = clustered(rows=30)
    same = np.ones_like(shifts)
    for options, message in [
        ({"num_experts": 31}, "num_experts=31 must be between 1 and the number of rows, 30"),
        ({"residual_rank": 25}, "residual_rank=25"),
        ({"variant": "best"}, "use one of 'paper', 'orthogonal'"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            PaperMoSE(**options).fit(states, shifts)
    with pytest.raises(ValueError, match="states has 30 rows and shifts has 29"):
        PaperMoSE().fit(states, shifts[1:])
    with pytest.raises(ValueError, match="only 1 shifts are different"):
        PaperMoSE(3).fit(states, same)
    with pytest.raises(ValueError, match="tries 4 to 10 experts, but there are only 4 rows"):
        PaperMoSE(residual_rank=2).fit(states[:4], shifts[:4])
    with pytest.raises(ValueError, match="diverged"):
        PaperMoSE(4, residual_rank=2, lr=1e30).fit(states, shifts)
