"""FASB against the paper's loop in plain code: one text, no cache, everything recomputed at each step."""

import pytest
import torch
from fasb_loop import LENGTHS, NEW, ROWS, adapter, bench_of, fitted, generate, heads_seen, reference

from finesteer_hf import FineSteerConfig
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.fitting.dose import DoseRunner
from finesteer_hf.methods.fasb import FASB, FASBConfig
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.conformance import check_files, fit_on_toy
from finesteer_hf.testing.toy import toy_model


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


def test_the_fit_keeps_the_heads_that_separate_held_out_answers_best():
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
    with pytest.raises(ValueError, match="backtracks once"):
        FASBConfig(compat="official", recheck=True)
    assert FASBConfig.paper().threshold == 0.4 and FASBConfig(recheck=True).requires == ["recheck"]
    with pytest.raises(AdapterFileError, match="needs `heads`"):
        FASB(FASBConfig(strength=1.0), {})


def test_files():
    check_files(fitted())


QUICK = {"left_padding", "streaming", "num_return_sequences", "mixed_rows", "threads", "half_precision"}


@pytest.mark.parametrize(
    "feature",
    [pytest.param(f, marks=[] if f in QUICK or f in FASB.refuses else pytest.mark.slow) for f in sorted(FEATURES)],
)
def test_feature(feature):
    check_feature(feature, fitted())
