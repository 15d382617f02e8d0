"""FASB with a gate: which rows are tracked, how strongly they are steered, and which stay unsteered."""

import functools

import pytest
import torch
from fasb_loop import LENGTHS, NEW, ROWS, bench_of, fitted, generate, reference

from finesteer_hf import FineSteerConfig, SteeringAdapter
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.methods.fasb import FASB, FASBConfig
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.conformance import check_files, fit_on_toy, make_bench
from finesteer_hf.testing.toy import toy_model


GATE = {"gate": "conformal", "gate_score": "state", "gate_epsilon": 0.3, "read_site": "resid_post[1]"}


def gate_of(model, tensors, prompt):
    """The gate and its score of a prompt, by the equations."""
    with torch.no_grad():
        state = model(prompt[None], output_hidden_states=True).hidden_states[2][0, -1].double()
    score = float(state @ tensors["gate.weight"].double() + tensors["gate.bias"].double())
    if score >= tensors["gate.threshold"]:
        return 1.0, score
    if score < tensors["gate.floor"]:
        return 0.0, score
    below = int((tensors["gate.calibration"] <= score).sum())
    share = (1 + below) / (len(tensors["gate.calibration"]) + 1) / float(tensors["gate.level"])
    return min(1.0, share) ** float(tensors["gate.gamma"]), score


@functools.cache
def gated_bench():
    """A model steered with a gate, and prompts with an open gate, a shut one, and two in between."""
    found, plain = fitted(**GATE), toy_model()
    bench, wanted = bench_of(found), [1.0, 0.0, "between", "between"]
    generator, prompts = torch.Generator().manual_seed(5), []
    while wanted:
        prompt = torch.randint(6, 54, (LENGTHS[len(prompts)],), generator=generator)
        gate, _ = gate_of(plain, found.tensors, prompt)
        back = reference(plain, found, prompt.tolist(), gate=gate)[1][0]
        if (gate == wanted[0] or (wanted[0] == "between" and 0 < gate < 1)) and (back >= 0) == (gate > 0):
            prompts.append(prompt)
            wanted.pop(0)
    bench.prompts = prompts
    return bench


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adaptive": False, "strength": 4.0},
        {"recheck": True, "backtrack": 2},
    ],
    ids=str,
)
def test_a_gate_decides_which_rows_are_tracked_and_how_strongly_they_are_steered(changes):
    base = fitted(**GATE)
    found = SteeringAdapter(type(base.config)(**{**base.config.__dict__, **changes}), base.tensors)
    bench, plain = bench_of(found), toy_model()
    bench.prompts = gated_bench().prompts
    gates, scores = zip(*(gate_of(plain, found.tensors, prompt) for prompt in bench.prompts), strict=True)
    assert gates[0] == 1 and gates[1] == 0 and all(0 < gate < 1 for gate in gates[2:])
    expected = [
        reference(plain, found, prompt.tolist(), gate=gate) for prompt, gate in zip(bench.prompts, gates, strict=True)
    ]
    texts = [text for text, _ in expected]
    assert texts[0] != bench.alone(0, steering=None, max_new_tokens=NEW)
    assert texts[1] == bench.alone(1, steering=None, max_new_tokens=NEW)
    assert [generate(bench, [row])[0] for row in ROWS] == texts
    assert generate(bench, ROWS, use_cache=False) == texts
    out = bench.model.generate(
        **bench.batch(ROWS), max_new_tokens=NEW, do_sample=False, output_steering=True, return_dict_in_generate=True
    )
    assert out.sequences[:, -NEW:].tolist() == texts
    record = out.steering["a"]
    torch.testing.assert_close(record["gate"], torch.tensor(gates), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(record["score"], torch.tensor(scores), atol=1e-4, rtol=1e-4)
    assert record["backtracked_at"].tolist() == [kept for _, (kept, _) in expected]
    assert record["backtracked_at"][0] >= 0 and record["backtracked_at"][1] == -1
    assert record["trigger_score"][1].isnan()


def test_a_row_with_a_shut_gate_is_bit_identical_to_the_base():
    bench = gated_bench()
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    inputs = bench.batch(ROWS)
    steered = torch.stack(bench.model.generate(**inputs, **settings).logits)
    base = torch.stack(bench.model.generate(**inputs, steering=None, **settings).logits)
    assert torch.equal(steered[:, 1], base[:, 1])
    assert not torch.allclose(steered[:, 0], base[:, 0])
    texts = generate(bench, ROWS, steering=None)
    ids = torch.cat([inputs["input_ids"], torch.tensor(texts)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), NEW, dtype=torch.long)], dim=1)
    with torch.no_grad():
        scored = bench.model(input_ids=ids, attention_mask=mask, prompt_lengths=torch.tensor(LENGTHS)).logits
        with bench.model.disable_steering():
            plain = bench.model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(scored[1, -NEW:], plain[1, -NEW:])
    assert not torch.allclose(scored[0, -NEW:], plain[0, -NEW:])


def test_a_gated_text_is_scored_as_at_a_scale_of_its_gate():
    bench, plain = gated_bench(), toy_model()
    gated = fitted(**GATE)
    ungated = SteeringAdapter(
        FASBConfig(**{**gated.config.__dict__, "gate": "always", "requires": []}),
        {name: tensor for name, tensor in gated.tensors.items() if not name.startswith("gate.")},
    )
    other = bench_of(ungated)
    for prompt in bench.prompts:
        answer = torch.randint(6, 54, (10,), generator=torch.Generator().manual_seed(2))
        text = {"input_ids": torch.cat([prompt, answer])[None], "prompt_lengths": torch.tensor([len(prompt)])}
        gate, _ = gate_of(plain, gated.tensors, prompt)
        with torch.no_grad(), other.model.steering("a", scale=gate):
            expected = other.model(**text).logits
        with torch.no_grad():
            torch.testing.assert_close(bench.model(**text).logits, expected, atol=2e-4, rtol=2e-4)


def test_the_gate_is_the_one_that_finesteer_fits():
    found = fitted(**GATE)
    config = FineSteerConfig(
        layer=1, gate_score="state", gate_epsilon=0.3, experts="reduced_rank", residual_rank=2, strength=4.0
    )
    other = fit_on_toy(config)[2]
    gate = {name: tensor for name, tensor in found.tensors.items() if name.startswith("gate.")}
    assert set(gate) == {name for name in other.tensors if name.startswith("gate.")}
    for name, tensor in gate.items():
        torch.testing.assert_close(tensor, other.tensors[name])
    assert found.config.requires == ["gate:conformal", "score:state"]
    assert found.config.fit["report"]["gate"] == other.config.fit["report"]["gate"]
    ungated = fitted()
    assert set(found.tensors) == set(ungated.tensors) | set(gate) and ungated.config.requires == []


def test_the_gate_reads_where_queries_are_separated_best():
    found = fitted(**{**GATE, "gate_score": "auto", "read_site": None})
    told = found.config.fit["report"]["read_sites"]
    assert list(told) == ["resid_post[0]", "resid_post[1]", "resid_post[2]"]
    best = max(told.values())
    assert found.config.read_site == next(site for site, value in told.items() if value >= best - 0.01)
    assert found.config.gate_score in ("ser", "t2q", "state")


def test_settings_and_tensors_of_a_gate_are_checked():
    for wrong in ({"gate": "none"}, {"gate_epsilon": 0.0}, {"subspace_rank": 0}, {"read_site": "head_out[1]"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FASBConfig(**wrong)
    found = fitted(**GATE)
    lacking = {name: tensor for name, tensor in found.tensors.items() if name != "gate.floor"}
    with pytest.raises(AdapterFileError, match=r"gate\.floor"):
        FASB(found.config, lacking)
    with pytest.raises(AdapterFileError, match=r"leaves .*gate_score.* to the fit"):
        FASB(FASBConfig(**{**found.config.__dict__, "gate_score": "auto"}), found.tensors)
    with pytest.raises(ValueError, match="out of range"):
        fitted(**{**GATE, "read_site": "resid_post[3]"})
    with pytest.raises(DatasetError, match="same state"):
        fitted(**{**GATE, "read_site": "resid_pre[0]"})


def test_files_without_a_gate_are_read():
    data = fitted().config.to_dict()
    older = {name: value for name, value in data.items() if "gate" not in name and name != "read_site"}
    del older["subspace_rank"]
    assert FASBConfig.from_dict(older) == fitted().config


def test_files():
    check_files(fitted(**GATE))


def gated_for_the_suite():
    """With a gate that shuts out one of `PROMPTS`, and lets one through in part and two whole."""
    found = fitted(**{**GATE, "gate_score": "ser", "subspace_rank": 4, "gate_epsilon": 0.25})
    # Between the scores of the two prompts below the threshold.
    return SteeringAdapter(found.config, {**found.tensors, "gate.floor": torch.tensor(0.1)})


_RNG = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(6, 54, (n,), generator=_RNG) for n in (7, 4, 9, 6)]
QUICK_GATED = {"left_padding", "mixed_rows", "chunked_prefill", "output_steering", "carried_cache"}


def test_the_suite_meets_gates_of_all_kinds():
    bench = make_bench(gated_for_the_suite(), prompts=PROMPTS)
    out = bench.model.generate(
        **bench.batch(ROWS), max_new_tokens=2, do_sample=False, output_steering=True, return_dict_in_generate=True
    )
    kinds = [gate if gate in (0.0, 1.0) else "between" for gate in out.steering["a"]["gate"].tolist()]
    assert kinds == ["between", 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "feature", [pytest.param(f, marks=[] if f in QUICK_GATED else pytest.mark.slow) for f in sorted(FEATURES)]
)
def test_feature_behind_a_gate(feature):
    check_feature(feature, gated_for_the_suite(), prompts=PROMPTS)
