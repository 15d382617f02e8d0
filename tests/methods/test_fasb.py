"""FASB against the paper's loop written plainly: one text, no cache, everything computed anew at each step."""

import contextlib
import functools

import pytest
import torch

from finesteer_hf import FineSteerConfig, SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.fitting.templating import EncodedRow, Passage
from finesteer_hf.methods.fasb import FASB, FASBConfig
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.conformance import check_files, fit_on_toy, make_bench
from finesteer_hf.testing.toy import toy_model


torch.set_num_threads(1)
NEW = 11
LENGTHS = (7, 4, 9, 5)


@functools.cache
def fitted(**settings):
    return fit_on_toy(FASBConfig(**{"num_heads": 4, "backtrack": 3, "threshold": 0.5, "strength": 8.0, **settings}))[2]


def adapter(**changes):
    """The fitted adapter with settings that need no other fit."""
    base = fitted()
    return SteeringAdapter(type(base.config)(**{**base.config.__dict__, **changes}), base.tensors)


@contextlib.contextmanager
def heads_seen(model, tensors, config, added):
    """Collect the deviations of all positions, and add `added [positions]` times sigma times theta to the heads."""
    deviations = []

    def hook(layer, module, args):
        states = args[0].clone()
        by_head = states.view(*states.shape[:2], 4, -1)
        for row, (at, head) in enumerate(config.heads):
            if at == layer:
                logit = by_head[:, :, head] @ tensors["probes.weight"][row] + tensors["probes.bias"][row]
                deviations.append(1 - torch.sigmoid(logit))
        for row, (at, head) in enumerate(config.heads):
            if at == layer:
                shift = tensors["sigma"][row] * tensors["directions"][row]
                by_head[0, :, head] += torch.tensor(added)[:, None] * shift
        return (states,)

    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(functools.partial(hook, layer))
        for layer, block in enumerate(model.model.layers)
    ]
    try:
        yield deviations
    finally:
        for handle in handles:
            handle.remove()


def reference(model, found, prompt, sample=False, eos=None, gate=1.0):
    """Generate as the paper says, behind a gate. Returns the new tokens, and where and why the text went back first."""
    config, tensors = found.config, found.tensors
    text, added, strength, steered, where = list(prompt), [0.0] * len(prompt), 0.0, False, (-1, None)
    floor = due = 0
    while True:
        now = [a if config.compat is None or i == len(text) - 1 else 0.0 for i, a in enumerate(added)]
        with torch.no_grad(), heads_seen(model, tensors, config, now) as deviations:
            logits = model(torch.tensor([text]), use_cache=False).logits[0, -1]
        deviation = float(torch.stack([d[0, -1] for d in deviations]).mean())
        choice = torch.multinomial(logits.softmax(-1)[None], 1) if sample else logits.argmax()
        text.append(int(choice))
        added.append(strength)
        count = len(text) - len(prompt)
        ended = count == NEW or text[-1] == eos
        dose = gate * config.strength * (deviation if config.adaptive else 1.0)
        deviates = gate > 0 and deviation > config.threshold
        if not steered and deviates and (count - floor >= config.backtrack or ended):
            kept = count - config.backtrack if count - floor > config.backtrack else floor
            del text[len(prompt) + kept :], added[len(prompt) + kept :]
            added[-1] = strength = dose
            steered, due = True, kept + config.backtrack
            where = (kept, deviation) if where[0] < 0 else where
            continue
        if ended:
            return text[len(prompt) :], where
        if config.recheck and steered and count >= due:
            added[-1] = strength = dose if deviates else 0.0
            steered, floor, due = deviates, floor if deviates else count, due + config.backtrack


def bench_of(found):
    model = toy_model()
    SteeredModelForCausalLM.from_model(model, steering={"a": found})
    generator = torch.Generator().manual_seed(11)
    return Bench(model, [torch.randint(6, 54, (n,), generator=generator) for n in LENGTHS], 1.0, [], [])


def generate(bench, rows, **kwargs):
    return bench.generate(rows, max_new_tokens=NEW, **kwargs)


ROWS = list(range(len(LENGTHS)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backtrack": 6},
        pytest.param({"adaptive": False, "strength": 4.0}, marks=pytest.mark.slow),
        pytest.param({"recheck": True}, marks=pytest.mark.slow),
        {"recheck": True, "backtrack": 2, "threshold": 0.45},
        {"threshold": 0.6},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_plain_loop(changes):
    found = adapter(**changes)
    bench, plain = bench_of(found), toy_model()
    expected = [reference(plain, found, prompt.tolist()) for prompt in bench.prompts]
    unsteered = [bench.alone(row, steering=None, max_new_tokens=NEW) for row in ROWS]
    texts = [text for text, _ in expected]
    assert texts != unsteered, "nothing goes back, so nothing is tested"
    assert [generate(bench, [row])[0] for row in ROWS] == texts
    assert generate(bench, ROWS) == texts
    assert generate(bench, ROWS, use_cache=False) == texts
    out = bench.model.generate(
        **bench.batch(ROWS), max_new_tokens=NEW, do_sample=False, output_steering=True, return_dict_in_generate=True
    )
    record = out.steering["a"]
    assert record["backtracked_at"].tolist() == [kept for _, (kept, _) in expected]
    for row, (_, (kept, score)) in enumerate(expected):
        if kept < 0:
            assert record["trigger_score"][row].isnan()
        else:
            assert float(record["trigger_score"][row]) == pytest.approx(score, abs=1e-5)


def test_a_text_that_ends_early_is_judged_when_it_ends():
    found = adapter(backtrack=6)
    bench, plain = bench_of(found), toy_model()
    eos = bench.alone(0, steering=None)[1]
    expected = [reference(plain, found, prompt.tolist(), eos=eos)[0] for prompt in bench.prompts]
    longest = max(map(len, expected))
    got = generate(bench, ROWS, eos_token_id=eos, pad_token_id=0)
    assert got == [text + [0] * (longest - len(text)) for text in expected]


def test_a_sample_is_the_plain_loops_for_the_same_seed():
    found = adapter()
    bench, plain = bench_of(found), toy_model()
    for row in ROWS:
        torch.manual_seed(row)
        expected, _ = reference(plain, found, bench.prompts[row].tolist(), sample=True)
        torch.manual_seed(row)
        assert generate(bench, [row], do_sample=True, top_k=0)[0] == expected


def test_the_official_form_shifts_the_newest_position_only_and_needs_no_cache():
    found = adapter(compat="official")
    bench, plain = bench_of(found), toy_model()
    expected = [reference(plain, found, prompt.tolist())[0] for prompt in bench.prompts]
    assert generate(bench, ROWS, use_cache=False) == expected
    assert expected != [reference(plain, adapter(), prompt.tolist())[0] for prompt in bench.prompts]
    with pytest.raises(ValueError, match="use_cache=False"):
        generate(bench, [0])


@pytest.mark.parametrize("compat", [None, "official"])
def test_a_text_is_scored_as_it_would_have_been_generated(compat):
    found = adapter(compat=compat)
    config, back = found.config, found.config.backtrack
    bench, plain = bench_of(found), toy_model()
    generator = torch.Generator().manual_seed(2)
    answers = [torch.randint(6, 54, (n,), generator=generator).tolist() for n in (1, 2, 5, 10)]
    expected = []
    for prompt, answer in zip(bench.prompts, answers, strict=True):
        text, first = [*prompt.tolist(), *answer], len(prompt) - 1
        added = [0.0] * len(text)
        with torch.no_grad(), heads_seen(plain, found.tensors, config, added) as seen:
            plain(torch.tensor([text]))
        deviation = torch.stack([d[0] for d in seen]).mean(0)
        for count in range(1, len(answer) + 1):
            # The state that chose token `count`; the published code judges that token's own.
            at = first + count - (compat is None)
            judged = count >= back + (compat is not None) or count == len(answer)
            if judged and deviation[at] > config.threshold:
                start = first + (max(count - back, 0) if compat is None else max(count - back, 1))
                added[start:] = [config.strength * float(deviation[at])] * (len(text) - start)
                break
        with torch.no_grad(), heads_seen(plain, found.tensors, config, added):
            expected.append(plain(torch.tensor([text])).logits[0])
    width = max(len(logits) for logits in expected)
    texts = [[*prompt.tolist(), *answer] for prompt, answer in zip(bench.prompts, answers, strict=True)]
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    with torch.no_grad():
        got = bench.model(input_ids=ids, attention_mask=mask, prompt_lengths=torch.tensor(LENGTHS)).logits
        with bench.model.disable_steering():
            base = bench.model(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(got * mask[..., None], base * mask[..., None])
    for row, logits in enumerate(expected):
        torch.testing.assert_close(got[row, : len(logits)], logits, atol=2e-4, rtol=2e-4)


def test_the_dose_is_what_generation_would_steer_with(monkeypatch):
    monkeypatch.setattr("finesteer_hf.fitting.dose.OWN_TOKENS", NEW)
    found = adapter(threshold=0.6)
    bench, plain = bench_of(found), toy_model()
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(6, 54, (4 + n % 5,), generator=generator).tolist() for n in range(12)]
    answers = [torch.randint(6, 54, (1 + n % 6,), generator=generator).tolist() for n in range(12)]
    passages = [Passage((*p, *a), len(p)) for p, a in zip(prompts, answers, strict=True)]
    asked = [Passage(tuple(prompt)) for prompt in prompts]
    rows = [EncodedRow(prompt, passage, passage) for prompt, passage in zip(asked, passages, strict=True)]
    weakest, went_back = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        kept, deviation = reference(plain, found, prompt)[1]
        text, first, added = [*prompt, *answer], len(prompt) - 1, [0.0] * (len(prompt) + len(answer))
        if kept >= 0:
            start = min(first + kept, len(text))
            added[start:] = [found.config.strength * deviation] * (len(text) - start)
        with torch.no_grad(), heads_seen(plain, found.tensors, found.config, added):
            probabilities = plain(torch.tensor([text])).logits[0].softmax(-1)
        weakest.append(min(float(probabilities[first + i, token]) for i, token in enumerate(answer)))
        went_back.append(kept >= 0)
    texts, base = (
        [
            bench.model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False, steering=s).tolist()
            for p in prompts
        ]
        for s in ("a", None)
    )
    changed = [text != own for text, own in zip(texts, base, strict=True)]
    assert 0 < sum(changed) < len(changed) and 0 < sum(went_back) < len(went_back)
    build = lambda s: FASB(FASBConfig(**{**found.config.__dict__, "strength": s}), found.tensors)  # noqa: E731
    unsteered, point = DoseRunner(plain, rows, asked).run(build, [0.0, found.config.strength])
    assert point.bottleneck == pytest.approx(sum(weakest) / len(weakest), rel=1e-3)
    assert point.changed == pytest.approx(sum(changed) / len(changed)) and unsteered.changed == 0.0


def test_it_stacks_with_a_method_that_reads_the_query():
    found, other = (
        adapter(),
        fit_on_toy(
            FineSteerConfig(layer=1, gate_score="state", experts="reduced_rank", residual_rank=2, strength=4.0)
        )[2],
    )
    bench = bench_of(found)
    bench.model.load_steering(other, "b")
    alone = [generate(bench, [row], steering={"a": 1.0, "b": 1.0})[0] for row in ROWS]
    assert generate(bench, ROWS, steering={"a": 1.0, "b": 1.0}) == alone
    assert generate(bench, ROWS, steering={"b": 1.0, "a": 1.0}) == alone
    assert alone not in (generate(bench, ROWS), generate(bench, ROWS, steering="b"))


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
    """A model steered behind a gate, with a prompt that it lets through, one that it shuts out, and two between."""
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


def test_a_row_that_the_gate_shuts_out_is_the_base_model_to_the_bit():
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


def test_the_gate_reads_where_queries_are_told_from_general_prompts_best():
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
    with pytest.raises(AdapterFileError, match=r"leaves .*gate_score.* to the data"):
        FASB(FASBConfig(**{**found.config.__dict__, "gate_score": "auto"}), found.tensors)
    with pytest.raises(ValueError, match="out of range"):
        fitted(**{**GATE, "read_site": "resid_post[3]"})
    with pytest.raises(DatasetError, match="same state"):
        fitted(**{**GATE, "read_site": "resid_pre[0]"})


def test_files_of_before_there_was_a_gate_are_read():
    data = fitted().config.to_dict()
    older = {name: value for name, value in data.items() if "gate" not in name and name != "read_site"}
    del older["subspace_rank"]
    assert FASBConfig.from_dict(older) == fitted().config


def test_the_fit_keeps_the_heads_that_tell_held_out_answers_best():
    found = fitted()
    report = found.config.fit["report"]
    kept = sorted(report["accuracy"], reverse=True)
    every = sorted((value for layer in report["all_accuracy"].values() for value in layer), reverse=True)
    assert report["accuracy"] == kept
    assert kept == pytest.approx(every[: len(kept)], abs=1e-4)
    torch.testing.assert_close(found.tensors["directions"].norm(dim=1), torch.ones(4))
    probe = fitted(direction="probe")
    weight = probe.tensors["probes.weight"]
    torch.testing.assert_close(probe.tensors["directions"], weight / weight.norm(dim=1, keepdim=True))


@pytest.mark.slow
def test_alpha_is_chosen_on_held_out_answers():
    found = fitted(strength="auto")
    assert found.config.strength > 0
    assert len(found.config.fit["report"]["dose_response"]) > 3


def test_settings_and_tensors_are_checked():
    for wrong in ({"threshold": 1.5}, {"backtrack": 0}, {"positions": "all"}, {"compat": "paper"}, {"num_heads": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FASBConfig(**wrong)
    with pytest.raises(ValueError, match="goes back once"):
        FASBConfig(compat="official", recheck=True)
    assert FASBConfig.paper().threshold == 0.4 and FASBConfig(recheck=True).requires == ["recheck"]
    with pytest.raises(AdapterFileError, match="needs `heads`"):
        FASB(FASBConfig(strength=1.0), {})


@pytest.mark.parametrize("settings", [{}, GATE], ids=["ungated", "gated"])
def test_files(settings):
    check_files(fitted(**settings))


QUICK = {"left_padding", "streaming", "num_return_sequences", "mixed_rows", "threads", "half_precision"}


@pytest.mark.parametrize(
    "feature",
    [pytest.param(f, marks=[] if f in QUICK or f in FASB.refuses else pytest.mark.slow) for f in sorted(FEATURES)],
)
def test_feature(feature):
    check_feature(feature, fitted())


def gated_for_the_suite():
    """With a gate that shuts out one of the suite's prompts, and lets one through in part and two whole."""
    found = fitted(**{**GATE, "gate_score": "ser", "subspace_rank": 4, "gate_epsilon": 0.25})
    # Between the scores of the two prompts below the threshold.
    return SteeringAdapter(found.config, {**found.tensors, "gate.floor": torch.tensor(0.1)})


QUICK_GATED = {"left_padding", "mixed_rows", "chunked_prefill", "output_steering", "carried_cache"}


def test_the_suite_meets_gates_of_all_kinds():
    bench = make_bench(gated_for_the_suite())
    out = bench.model.generate(
        **bench.batch(ROWS), max_new_tokens=2, do_sample=False, output_steering=True, return_dict_in_generate=True
    )
    kinds = [gate if gate in (0.0, 1.0) else "between" for gate in out.steering["a"]["gate"].tolist()]
    assert kinds == ["between", 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "feature", [pytest.param(f, marks=[] if f in QUICK_GATED else pytest.mark.slow) for f in sorted(FEATURES)]
)
def test_feature_behind_a_gate(feature):
    check_feature(feature, gated_for_the_suite())
