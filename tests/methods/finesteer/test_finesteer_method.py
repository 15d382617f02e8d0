"""FineSteer at run time against the paper's equations, read in numpy."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import torch
from planted import PlantedData, states

from finesteer_hf.adapters.adapter import SteeringAdapter, tensors_equal
from finesteer_hf.errors import AdapterFileError, AdapterMismatchError
from finesteer_hf.estimators import PaperMoSE
from finesteer_hf.method_api import FitResult
from finesteer_hf.methods._shared.rows import contrast_rows, query_rows
from finesteer_hf.methods.finesteer import FineSteer, FineSteerConfig
from finesteer_hf.sites import Site, TextTower
from finesteer_hf.testing.toy import toy_model


SITE = Site("resid_post", 2)


def fit(config: FineSteerConfig, data: PlantedData | None = None) -> FitResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FineSteer.fit(data or PlantedData(), config)


def build(result: FitResult) -> FineSteer:
    return FineSteer(result.config, result.tensors)


@pytest.fixture(scope="module")
def data() -> PlantedData:
    return PlantedData()


@pytest.fixture(scope="module")
def paper(data: PlantedData) -> FitResult:
    return fit(FineSteerConfig.paper(layer=2, subspace_rank=6), data)


@pytest.fixture(scope="module")
def default(data: PlantedData) -> FitResult:
    return fit(FineSteerConfig(layer=2, strength=1.0), data)


def test_the_paper_gate_is_equations_6_to_8(data: PlantedData, paper: FitResult) -> None:
    h = query_rows(data, SITE, ("fit", "calibration")).astype(np.float64)
    mean = h.mean(axis=0)
    basis = np.linalg.svd(h - mean, full_matrices=False)[2][:6].T

    def ratio(x: np.ndarray) -> np.ndarray:
        return np.square((x - mean) @ basis).sum(1) / np.square(x - mean).sum(1)

    own, epsilon, gamma = np.sort(ratio(h)), 0.10, 2.0
    new = np.concatenate([data.query(SITE, "validation"), data.general(SITE, "validation")])
    score = ratio(new.astype(np.float64))
    tau = own[int(np.ceil(epsilon * len(own))) - 1]
    share = np.searchsorted(own, score, side="right") / len(own)
    gate = np.where(score >= tau, 1.0, np.minimum(share / epsilon, 1.0) ** gamma)

    decision = build(paper).decide(states(SITE, new))
    np.testing.assert_allclose(decision.record["score"].numpy(), score, atol=1e-5)
    # a score that ties with a calibration score within rounding may fall on either side of it
    apart = np.abs(score[:, None] - own).min(axis=1) > 1e-5
    assert decision.gate is not None and apart.sum() > 50
    np.testing.assert_allclose(decision.gate.numpy()[apart], gate[apart], atol=1e-5)


def test_the_paper_vector_is_equations_11_to_14(data: PlantedData, paper: FitResult) -> None:
    t = {name: tensor.numpy().astype(np.float64) for name, tensor in paper.tensors.items()}
    h = data.query(SITE, "validation").astype(np.float64)
    logits = h @ t["router.weight"].T + t["router.bias"]
    alpha = np.exp(logits - logits.max(1, keepdims=True))
    alpha /= alpha.sum(1, keepdims=True)
    hidden = np.maximum(h @ t["residual.hidden_weight"].T + t["residual.hidden_bias"], 0.0)
    beta = hidden @ t["residual.output_weight"].T + t["residual.output_bias"]
    vector = alpha @ t["experts.prototypes"] + beta @ t["residual.basis"].T

    decision = build(paper).decide(states(SITE, h))
    np.testing.assert_allclose(decision.vectors[SITE].numpy(), vector, atol=1e-5)
    np.testing.assert_allclose(decision.record["experts"].numpy(), alpha, atol=1e-5)
    assert decision.record["experts"].shape == (len(h), paper.config.num_experts)


def test_folding_changes_nothing(data: PlantedData, paper: FitResult) -> None:
    rows = contrast_rows(data, SITE, [SITE], ("fit", "calibration"))
    network = PaperMoSE(seed=data.seed).fit(rows.queries, rows.shifts, rows.groups).network_
    h = torch.from_numpy(data.query(SITE, "validation"))
    with torch.no_grad():
        torch.testing.assert_close(
            build(paper).decide(states(SITE, h.numpy())).vectors[SITE], network(h), atol=1e-5, rtol=1e-5
        )


def test_prototypes_are_means_of_unit_shifts(data: PlantedData, paper: FitResult) -> None:
    prototypes = paper.tensors["experts.prototypes"].double().numpy()
    shifts = data.shifts(SITE, "fit", "calibration").astype(np.float64)
    unit = shifts / np.linalg.norm(shifts, axis=1, keepdims=True)
    nearest = np.argmin(np.linalg.norm(unit[:, None] - prototypes, axis=2), axis=1)
    means = np.stack([unit[nearest == k].mean(axis=0) for k in range(len(prototypes))])
    np.testing.assert_allclose(prototypes, means, atol=2e-2)
    assert 4 <= paper.config.num_experts <= 10


@pytest.mark.parametrize("gate", ["conformal", "quantile", "logistic", "ser", "always"])
@pytest.mark.parametrize("experts", ["mixture", "reduced_rank"])
def test_every_gate_works_with_every_closed_form(data: PlantedData, gate: str, experts: str) -> None:
    config = FineSteerConfig(
        layer=2,
        gate=gate,
        experts=experts,
        num_experts="auto" if experts == "reduced_rank" else 2,
        residual_rank=3,
        strength=1.0,
    )
    result = fit(config, data)
    assert set(result.tensors) == set(FineSteer.tensor_shapes(result.config))
    decision = build(result).decide(states(SITE, data.query(SITE, "validation")))
    assert decision.vectors[SITE].dtype == torch.float32
    assert decision.vectors[SITE].shape == (len(data.query(SITE, "validation")), 24)
    if gate == "always":
        assert decision.gate is None and "score" not in decision.record
    else:
        assert decision.gate is not None and float(decision.gate.min()) >= 0 and float(decision.gate.max()) <= 1
    assert result.config.requires[0] == f"gate:{gate}" and f"experts:{experts}" in result.config.requires


def test_one_expert_needs_no_router(data: PlantedData) -> None:
    settings = {"layer": 2, "num_experts": 1, "residual_rank": 4, "strength": 1.0}
    auto, mixture = fit(FineSteerConfig(**settings), data), fit(FineSteerConfig(experts="mixture", **settings), data)
    assert auto.config.experts == "reduced_rank" and "router.weight" not in auto.tensors
    queries = states(SITE, data.query(SITE, "validation"))
    torch.testing.assert_close(build(auto).decide(queries).vectors, build(mixture).decide(queries).vectors)


def test_clear_general_queries_get_exactly_nothing(data: PlantedData, default: FitResult) -> None:
    method = build(default)
    closed = method.decide(states(SITE, data.general(SITE, "validation"))).gate
    opened = method.decide(states(SITE, data.query(SITE, "validation"))).gate
    assert closed is not None and opened is not None
    assert torch.count_nonzero(closed) == 0
    assert float((opened == 1).float().mean()) > 0.8


def test_rows_do_not_touch_each_other(data: PlantedData, default: FitResult) -> None:
    method, rows = build(default), data.query(SITE, "validation")[:5]
    together = method.decide(states(SITE, rows))
    for index in range(5):
        alone = method.decide(states(SITE, rows[index : index + 1]))
        torch.testing.assert_close(together.vectors[SITE][index : index + 1], alone.vectors[SITE])
        torch.testing.assert_close(together.gate[index : index + 1], alone.gate)


def test_deciding_compiles_whole(data: PlantedData, default: FitResult) -> None:
    method = build(default)
    rows = torch.from_numpy(data.query(SITE, "validation")[:4])
    assert method.parameters_on(rows.device)

    def decide(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decision = method.decide(states_of(h))
        return decision.vectors[SITE], decision.gate

    def states_of(h: torch.Tensor):
        from finesteer_hf.processors import QueryStates

        return QueryStates({SITE: h}, len(h), h.device)

    exported = torch.compile(decide, backend="eager", fullgraph=True)(rows)
    for traced, plain in zip(exported, decide(rows), strict=True):
        torch.testing.assert_close(traced, plain)


def test_saving_and_loading_changes_nothing(tmp_path, default: FitResult, paper: FitResult) -> None:
    for name, result in (("default", default), ("paper", paper)):
        adapter = SteeringAdapter(result.config, result.tensors)
        adapter.config.fit = {"report": result.report}
        adapter.save_pretrained(tmp_path / name)
        again = SteeringAdapter.from_pretrained(tmp_path / name)
        assert again.config == adapter.config and tensors_equal(again.tensors, adapter.tensors)
        assert isinstance(again.build(), FineSteer)


def test_a_gate_that_always_fires_can_be_saved(tmp_path) -> None:
    small = PlantedData(rows=60)
    with pytest.warns(UserWarning, match="calibration rows"):
        result = FineSteer.fit(small, FineSteerConfig(layer=2, strength=1.0, gate_epsilon=0.02))
    adapter = SteeringAdapter(result.config, result.tensors)
    adapter.save_pretrained(tmp_path)
    gate = SteeringAdapter.from_pretrained(tmp_path).build().decide(states(SITE, small.general(SITE, "fit"))).gate
    assert gate is not None and bool((gate == 1).all())


def test_damaged_adapters_are_refused(default: FitResult) -> None:
    def check(**changed: torch.Tensor | None) -> None:
        tensors = {name: t for name, t in {**default.tensors, **changed}.items() if t is not None}
        SteeringAdapter(default.config, tensors).check_tensors()

    check()
    for changed, message in (
        ({"residual.up": None}, "residual.up"),
        ({"residual.mean": torch.zeros(25)}, r"\(25,\)"),
        ({"residual.mean": torch.full((24,), torch.nan)}, "NaN"),
        ({"residual.mean": torch.zeros(24, dtype=torch.float64)}, "float64"),
        ({"gate.extra": torch.zeros(2)}, "gate.extra"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            check(**changed)
    scores = default.tensors["gate.calibration"]
    for name, values in (
        ("gate.calibration", scores.flip(0)),
        ("gate.calibration", scores[:0]),
        ("gate.gamma", -scores[0] * 0),
    ):
        with pytest.raises(AdapterFileError, match=name):
            FineSteer(default.config, default.tensors | {name: values})
    with pytest.raises(AdapterFileError, match=r"residual\.up"):
        FineSteer(default.config, {name: t for name, t in default.tensors.items() if name != "residual.up"})


def test_another_base_is_refused(default: FitResult) -> None:
    adapter, model = SteeringAdapter(default.config, default.tensors), toy_model()
    with pytest.raises(AdapterMismatchError, match=r"24.*32"):
        adapter.check_base(model, TextTower(model))


def test_the_default_adapter_is_small_at_a_width_of_4096(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    wide = PlantedData(rows=240, width=64, clarity=(1.0,), clusters=4)
    # the planted world turned into 4096 dimensions, with variance in all of them
    turn = np.linalg.qr(rng.standard_normal((4096, 64)))[0].T.astype(np.float32)
    for store in (wide._query, wide._general, wide._rejected, wide._chosen):
        store[0] = store[0] @ turn + 0.05 * rng.standard_normal((len(store[0]), 4096)).astype(np.float32)
    wide.info = wide.info.__class__(1, 4096, 32, 128, 50)
    started = time.perf_counter()
    result = fit(FineSteerConfig(layer=0, strength=1.0), wide)
    fitted = time.perf_counter() - started
    SteeringAdapter(result.config, result.tensors).save_pretrained(tmp_path)
    size = (tmp_path / "steering_model.safetensors").stat().st_size
    started = time.perf_counter()
    SteeringAdapter.from_pretrained(tmp_path).build()
    loaded = time.perf_counter() - started
    with capsys.disabled():
        print(
            f"\nd=4096: {size:,} bytes, loads in {1000 * loaded:.0f} ms, fitted in {fitted:.1f} s, "
            f"{result.config.experts} K={result.config.num_experts} r={result.config.residual_rank}"
        )
    assert size <= 2_000_000
