"""States against a plain hook on each text alone; passes and blocks as counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fitting_toys import random_rows, small_model

from finesteer_hf import ConstantVector, SteeredModelForCausalLM
from finesteer_hf.errors import DatasetError, SiteError
from finesteer_hf.fitting.capture.jobs import Job, make_jobs
from finesteer_hf.fitting.capture.packing import lay_out, packed_length
from finesteer_hf.fitting.capture.reader import StateReader
from finesteer_hf.fitting.capture.store import ActivationStore
from finesteer_hf.fitting.data.encoding import EncodedRow, Passage
from finesteer_hf.method_api import PROMPT_POOLS, CaptureRequest
from finesteer_hf.sites import Site, TextTower


POOLS = ("query", "query_mean", "answer_mean", "answer_last")


def capture(model: Any, request: CaptureRequest, rows: list[EncodedRow], **settings: Any) -> tuple[Any, StateReader]:
    reader = StateReader(model, request, **settings)
    store = ActivationStore(None, {})
    for batch in reader.read(make_jobs(rows)):
        store.add(batch)
    return store, reader


def by_hand(model: Any, site: Site, passage: Passage) -> torch.Tensor:
    """The stream of one text alone, unpadded, through the whole model: `[tokens, width]`."""
    seen: list[torch.Tensor] = []
    tower = TextTower(model)

    def keep(value: Any) -> None:
        seen.append((value[0] if isinstance(value, tuple) else value).detach().float()[0])

    if site.kind == "resid_post":
        handle = tower.layers[site.layer].register_forward_hook(lambda m, a, o: keep(o))
    else:
        module = tower.layers[site.layer] if site.kind == "resid_pre" else tower.projection(site)
        handle = module.register_forward_pre_hook(lambda m, a: keep(a))
    with torch.no_grad():
        model(input_ids=torch.tensor([passage.ids]))
    handle.remove()
    return seen[0]


def check_against_hand(model: Any, request: CaptureRequest, store: ActivationStore, rows: list[EncodedRow]) -> None:
    for site in request.sites:
        prompts = [by_hand(model, site, row.prompt) for row in rows]
        for pool, expected in (("query", [p[-1] for p in prompts]), ("query_mean", [p.mean(0) for p in prompts])):
            found = store.get((site, pool), [row.prompt for row in rows])
            np.testing.assert_allclose(found, np.stack(expected), rtol=2e-4, atol=2e-4)
        for side in ("chosen", "rejected"):
            passages = [getattr(row, side) for row in rows]
            streams = [by_hand(model, site, p)[p.answer_start :] for p in passages]
            mean = np.stack([s.mean(0).numpy() for s in streams])
            last = np.stack([s[-1 - p.closing].numpy() for s, p in zip(streams, passages, strict=True)])
            np.testing.assert_allclose(store.get((site, "answer_mean"), passages), mean, rtol=2e-4, atol=2e-4)
            np.testing.assert_allclose(store.get((site, "answer_last"), passages), last, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("llama", True),
        ("gpt2", True),
        ("gpt_neox", True),
        ("opt", True),
        ("mistral", True),
        ("gemma2", True),
        ("bloom", False),
        ("mamba", False),
    ],
)
def test_states_are_those_of_each_text_alone(kind: str, shares: bool) -> None:
    model = small_model(kind)
    sites = [Site("resid_pre", 0), Site("resid_pre", 2), Site("resid_post", 1), Site("resid_post", 3)]
    if kind != "mamba":
        sites.append(Site("head_out", 2))
    if kind not in ("mamba", "opt"):
        sites.append(Site("mlp_act", 1))
    request = CaptureRequest(tuple(sites), POOLS)
    rows = random_rows(9)
    store, reader = capture(model, request, rows, batch_size=4)
    assert reader.shares_prompts is shares
    check_against_hand(model, request, store, rows)


def test_both_ways_of_reading_agree() -> None:
    model, rows = small_model("llama"), random_rows(12)
    request = CaptureRequest((Site("resid_post", 2),), POOLS)
    shared, _ = capture(model, request, rows, share_prompts=True)
    whole, _ = capture(model, request, rows, share_prompts=False)
    for pool in POOLS:
        passages = [row.prompt if pool in PROMPT_POOLS else row.chosen for row in rows]
        key = (Site("resid_post", 2), pool)
        np.testing.assert_allclose(shared.get(key, passages), whole.get(key, passages), rtol=1e-4, atol=1e-4)


def test_texts_longer_than_a_window_are_run_whole() -> None:
    model, rows = small_model("mistral", sliding_window=6), random_rows(8)
    assert any(len(row.chosen.ids) > 6 for row in rows)
    request = CaptureRequest((Site("resid_post", 3),), POOLS)
    store, _ = capture(model, request, rows)
    check_against_hand(model, request, store, rows)


def test_the_prompt_passes_once_and_nothing_above_the_deepest_site_runs() -> None:
    model, rows = small_model("llama"), random_rows(10)
    runs: Counter[str] = Counter()
    tower = TextTower(model)
    for number, block in enumerate(tower.layers):
        block.register_forward_hook(lambda m, a, o, number=number: runs.update([f"block {number}"]))
    model.lm_head.register_forward_hook(lambda m, a, o: runs.update(["head"]))
    request = CaptureRequest((Site("resid_post", 0), Site("resid_post", 2)))
    _, reader = capture(model, request, rows, share_prompts=True)
    assert reader.count.passes == 1
    assert runs == {"block 0": 1, "block 1": 1, "block 2": 1}
    prompts = sum(len(row.prompt.ids) for row in rows)
    answers = sum(len(p.ids) - p.answer_start for row in rows for p in (row.chosen, row.rejected))
    assert reader.count.tokens == prompts + answers

    runs.clear()
    capture(model, CaptureRequest((Site("resid_pre", 2),)), rows, share_prompts=True)
    assert runs == {"block 0": 1, "block 1": 1}


def test_repeated_prompts_and_answers_are_read_once() -> None:
    row = random_rows(1)[0]
    other = Passage((*row.prompt.ids, 5, 6), len(row.prompt.ids))
    rows = [row, row, EncodedRow(row.prompt, row.chosen, other)]
    _, reader = capture(small_model("llama"), CaptureRequest((Site("resid_post", 1),)), rows, share_prompts=True)
    answers = {row.chosen, row.rejected, other}
    assert reader.count.tokens == len(row.prompt.ids) + sum(len(a.ids) - a.answer_start for a in answers)


def test_an_answer_tokenised_with_its_prompt_is_read_alone() -> None:
    model = small_model("llama")
    row = EncodedRow(Passage((3, 4, 5)), Passage((3, 4, 9, 7), 2), Passage((3, 4, 8), 2))
    request = CaptureRequest((Site("resid_post", 2),), POOLS)
    rows = [row, *random_rows(3)]
    store, _ = capture(model, request, rows)
    check_against_hand(model, request, store, rows)


def test_the_model_is_left_as_it_was() -> None:
    model, rows = small_model("gpt2"), random_rows(4)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    seen: list[int] = []
    mine = model.transformer.h[0].register_forward_hook(lambda m, a, o: seen.append(1))
    before = {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}
    capture(model, CaptureRequest((Site("resid_post", 1),)), rows)
    assert modes == [module.training for module in model.modules()]
    assert before == {id(m): (len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()}
    assert seen
    mine.remove()


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model = small_model("gpt2")

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("boom")

    handle = model.transformer.h[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        capture(model, CaptureRequest((Site("resid_post", 2),)), random_rows(3))
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_steered_model_is_read_unsteered() -> None:
    rows, request = random_rows(5), CaptureRequest((Site("resid_post", 3),))
    plain, _ = capture(small_model("llama"), request, rows)
    model = SteeredModelForCausalLM.from_model(small_model("llama"))
    with model.steering_with([ConstantVector("resid_post[1]", 10 * torch.ones(32))]):
        steered, _ = capture(model, request, rows)
    key, prompts = (Site("resid_post", 3), "query"), [row.prompt for row in rows]
    np.testing.assert_array_equal(steered.get(key, prompts), plain.get(key, prompts))


def test_half_precision_is_read_as_float32() -> None:
    model = small_model("llama").to(torch.bfloat16)
    store, reader = capture(model, CaptureRequest((Site("resid_post", 1),)), random_rows(4))
    assert reader.shares_prompts
    assert store.get((Site("resid_post", 1), "query"), [random_rows(4)[0].prompt]).dtype == np.float32


def test_states_that_are_not_finite_name_their_rows() -> None:
    model, rows = small_model("llama"), random_rows(4)
    bad = next(t for t in range(3, 60) if sum(t in (*r.chosen.ids, *r.rejected.ids) for r in rows) == 1)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    owner = next(i for i, r in enumerate(rows) if bad in (*r.chosen.ids, *r.rejected.ids))

    def describe(passages: Any) -> str:
        return f"rows {sorted({i for i, r in enumerate(rows) for p in passages if p in (r.prompt, r.chosen, r.rejected)})}"

    with pytest.raises(DatasetError, match=rf"rows \[{owner}\].*resid_post\[0\].*NaN"):
        capture(model, CaptureRequest((Site("resid_post", 0),)), rows, describe=describe, share_prompts=True)


def test_a_batch_that_runs_out_of_memory_is_halved() -> None:
    model, rows = small_model("llama"), random_rows(16)
    request = CaptureRequest((Site("resid_post", 1),))
    expected, _ = capture(model, request, rows, share_prompts=False)

    def limited(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] > 5:
            raise torch.OutOfMemoryError("out of memory")

    handle = model.model.register_forward_pre_hook(limited, with_kwargs=True)
    store, reader = capture(model, request, rows, share_prompts=False)
    handle.remove()
    key, prompts = (Site("resid_post", 1), "query"), [row.prompt for row in rows]
    np.testing.assert_allclose(store.get(key, prompts), expected.get(key, prompts), rtol=1e-4, atol=1e-5)
    # 32 texts: each of the budgets that failed is tried once, the one that holds is kept.
    assert reader.count.passes <= 4 + 32 / 2


def test_offloaded_weights_are_offloaded_again() -> None:
    from accelerate import cpu_offload

    rows = random_rows(6)
    request = CaptureRequest((Site("head_out", 1), Site("resid_post", 0)))
    expected, _ = capture(small_model("llama"), request, rows)
    model = small_model("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    store, _ = capture(model, request, rows)
    for site in request.sites:
        prompts = [row.prompt for row in rows]
        np.testing.assert_allclose(
            store.get((site, "query"), prompts), expected.get((site, "query"), prompts), rtol=1e-5
        )
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_batch_size_counts_texts() -> None:
    rows = random_rows(8)
    model, request = small_model("llama"), CaptureRequest((Site("resid_post", 1),))
    assert capture(model, request, rows, batch_size=4, share_prompts=True)[1].count.passes == 4
    assert capture(model, request, rows, batch_size=4, share_prompts=False)[1].count.passes == 4
    with pytest.raises(ValueError, match="batch_size"):
        StateReader(model, request, batch_size=0)


def test_a_site_that_the_model_lacks_is_refused_at_once() -> None:
    with pytest.raises(SiteError, match="out of range"):
        StateReader(small_model("llama"), CaptureRequest((Site("resid_post", 4),)))


def test_a_row_may_be_longer_than_the_window_and_a_text_may_not() -> None:
    # Each text but the last fits the window of 13; the row of the first three has 46 tokens.
    rows = [
        EncodedRow(Passage((3,) * 10), Passage((*(3,) * 10, 4), 10), Passage((*(3,) * 10, 5), 10)),
        EncodedRow(Passage((6,)), Passage((6, *range(7, 17)), 1), Passage((6, *range(17, 27)), 1)),
        EncodedRow(Passage((8, 9)), Passage((8, 9, *range(7, 12)), 2), Passage((8, 9, *range(17, 22)), 2)),
        EncodedRow(Passage((9,) * 11), Passage((*(9,) * 11, 4), 11), Passage((*(9,) * 11, 5, 6), 11)),
    ]
    model = small_model("mistral", sliding_window=13)
    request = CaptureRequest((Site("resid_post", 3),), POOLS)
    store, reader = capture(model, request, rows, share_prompts=True)
    assert reader.count.passes == 2
    check_against_hand(model, request, store, rows)


def test_rows_are_padded_little_and_prompts_without_answers_are_packed_too() -> None:
    model, rows = small_model("llama"), random_rows(60)
    jobs = make_jobs(rows, [row.prompt for row in random_rows(20, seed=1)])
    reader = StateReader(model, CaptureRequest((Site("resid_post", 1),)), share_prompts=True)
    list(reader.read(jobs))
    assert reader.count.tokens == sum(packed_length(job) for job in jobs)
    assert reader.count.padded_tokens < 1.2 * reader.count.tokens


@pytest.mark.parametrize("begun", [0, 2])
def test_a_packed_token_sees_its_own_text_alone(begun: int) -> None:
    beginning = tuple(range(3, 3 + begun))
    jobs = [
        Job(Passage((*beginning, 10, 11)), (Passage((*beginning, 10, 11, 12), 2 + begun),)),
        Job(
            Passage((*beginning, 20)),
            (Passage((*beginning, 20, 21, 22), 1 + begun), Passage((*beginning, 20, 23), 1 + begun)),
        ),
        Job(Passage((*beginning, 30))),
    ]
    packed = lay_out([jobs[:2], jobs[2:]], begun, torch.device("cpu"))
    texts = [answer.ids for answer in packed.answers] + [prompt.ids for prompt in packed.prompts]
    for row in range(2):
        for column in range(packed.ids.shape[1]):
            seen = packed.visible[row, column]
            assert seen[:begun].all()
            if packed.ids[row, column]:
                line = (*beginning, *packed.ids[row, seen[begun:]].tolist())
                assert any(text[: len(line)] == line for text in texts)
                assert packed.positions[row, column] == len(line) - 1
    assert packed.real == sum(packed_length(job, begun) for job in jobs) == 8
    assert packed.visible.any(-1).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2"])
def test_a_common_prefix_is_run_once(kind: str) -> None:
    model = small_model(kind, **({"sliding_window": 64} if kind in ("mistral", "gemma2") else {}))
    header = tuple(range(20, 31))

    def headed(passage: Passage) -> Passage:
        start = None if passage.answer_start is None else passage.answer_start + len(header)
        return replace(passage, ids=(*header, *passage.ids), answer_start=start)

    plain = random_rows(12)
    rows = [EncodedRow(headed(row.prompt), headed(row.chosen), headed(row.rejected)) for row in plain]
    request = CaptureRequest((Site("resid_post", 1), Site("resid_pre", 3)), POOLS)
    store, reader = capture(model, request, rows, share_prompts=True, batch_size=4)
    check_against_hand(model, request, store, rows)
    alone = capture(model, request, plain, share_prompts=True, batch_size=4)[1].count
    assert reader.count.tokens == alone.tokens + len(header)
    assert reader.count.passes == alone.passes + 1


def test_general_prompts_share_their_own_prefix() -> None:
    model, plain, general = small_model("llama"), random_rows(12), random_rows(10, seed=1)
    headers = tuple(range(20, 31)), tuple(range(40, 50))

    def headed(header: tuple[int, ...], passage: Passage) -> Passage:
        start = None if passage.answer_start is None else passage.answer_start + len(header)
        return replace(passage, ids=(*header, *passage.ids), answer_start=start)

    rows = [EncodedRow(*(headed(headers[0], p) for p in (row.prompt, row.chosen, row.rejected))) for row in plain]
    prompts = [headed(headers[1], row.prompt) for row in general]
    jobs, site = make_jobs(rows, prompts), Site("resid_post", 1)
    reader, store = StateReader(model, CaptureRequest((site,)), share_prompts=True), ActivationStore(None, {})
    for batch in reader.read(jobs):
        store.add(batch)
    bare = make_jobs(plain, [row.prompt for row in general])
    assert reader.count.tokens == sum(map(packed_length, bare)) + sum(map(len, headers))
    expected = np.stack([by_hand(model, site, prompt)[-1].numpy() for prompt in prompts])
    np.testing.assert_allclose(store.get((site, "query"), prompts), expected, rtol=2e-4, atol=2e-4)
