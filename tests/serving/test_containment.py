"""What goes wrong with one request touches that request only; what goes wrong with the engine is said."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from engines import engine, results
from transformers.generation.continuous_batching import cache, requests

from finesteer_hf import ConstantVector
from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.processors import Decision, SteeringProcessor
from finesteer_hf.serving import contract
from finesteer_hf.serving.requests import child_id
from finesteer_hf.serving.sampling import Sampling
from finesteer_hf.sites import Site


class Sick(SteeringProcessor):
    """Reads the query and then fails for some of them."""

    reads = (Site("resid_post", 1),)
    writes = (Site("resid_post", 1),)

    def __init__(self, positions="all", how="raises"):
        self.positions, self.how = positions, how

    def decide(self, queries):
        if self.how == "raises":
            raise ArithmeticError("no such query")
        return Decision({self.writes[0]: torch.full((1, 32), float("nan"))})


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("setting", [{}, {"max_batch_tokens": 9}], ids=str)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_method_that_fails_ends_its_own_requests(model, prompts, alone, how, positions, setting, streaming):
    with engine(model, **setting) as manager:
        good, sick = [], []
        for round_ in range(2):
            for index in range(6):
                good.append((index, manager.add_request(prompts[index], steering="finesteer-all")))
            with model.steering_with([Sick(positions, how)]):
                sick.append(manager.add_request(prompts[round_], streaming=streaming, num_return_sequences=1 + round_))
        children = [child_id(sick[1], 0)]
        seen = {}
        while len(seen) < len(good) + 3:
            output = manager.get_result(timeout=5)
            assert output is not None
            if output.request_id in (*sick, *children):
                # Not one unsteered token is delivered of it.
                assert output.error is not None
            if output.is_finished():
                seen[output.request_id] = output
        assert manager.stats.failed == 2 and not manager.session.requests and not manager.session.table.in_use
        assert manager.is_running()
    for index, name in good:
        assert seen[name].generated_tokens == alone(index, "finesteer-all")
    for name in (*sick, *children):
        assert ("no such query" if how == "raises" else "not finite") in seen[name].error


@pytest.mark.parametrize("streaming", [False, True])
def test_a_failing_request_that_would_end_in_the_same_step_fails(model, prompts, streaming):
    with engine(model) as manager:
        with model.steering_with([Sick()]):
            name = manager.add_request(prompts[0], max_new_tokens=1, streaming=streaming)
        assert "no such query" in results(manager, [name], timeout=5)[name].error
        assert not manager.session.requests


def test_sampling_that_fails_ends_its_own_request(model, prompts, alone):
    class Broken(ConstantVector):
        def logits_processors(self, scale):
            return [lambda ids, scores: scores[:, :3]]

    with engine(model) as manager:
        good = manager.add_request(prompts[0], steering="caa-all")
        with model.steering_with([Broken("resid_post[1]", torch.ones(32))]):
            bad = manager.add_request(prompts[1])
        got = results(manager, [good, bad])
    assert got[good].generated_tokens == alone(0, "caa-all") and got[bad].error


def test_cancelled_requests_leave_nothing_behind(model, prompts, alone):
    with engine(model) as manager:
        long = [
            manager.add_request(prompts[i], steering="finesteer-all", max_new_tokens=150, num_return_sequences=2)
            for i in range(3)
        ]
        waiting = manager.add_request(prompts[3], steering="caa-all", max_new_tokens=150)
        kept = manager.add_request(prompts[4], steering="caa-all", max_new_tokens=60)
        for name in (*long, waiting):
            manager.cancel_request(name)
            manager.cancel_request(child_id(name, 0))
        manager.cancel_request("nobody")
        got = results(manager, [kept])
        assert not manager.session.requests and not manager.session.table.in_use
        # Its id may be used again.
        again = manager.add_request(prompts[0], request_id=long[0], steering="caa-all")
        assert results(manager, [again])[again].generated_tokens == alone(0, "caa-all")
    assert got[kept].generated_tokens[:6] == alone(4, "caa-all")


def test_an_id_in_flight_is_not_taken_twice(model, prompts, alone):
    with engine(model) as manager:
        with manager.pause():
            manager.add_request(prompts[0], request_id="mine", steering="caa-all")
            with pytest.raises(ValueError, match="'mine' is in flight"):
                manager.add_request(prompts[1], request_id="mine")
        assert results(manager, ["mine"])["mine"].generated_tokens == alone(0, "caa-all")


def test_threads_may_add_at_once(model, prompts, alone):
    names: dict[str, int] = {}

    def add(index):
        for _ in range(8):
            names[manager.add_request(prompts[index], steering="finesteer-all")] = index

    with engine(model) as manager:
        threads = [threading.Thread(target=add, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        got = results(manager, list(names))
    assert all(got[name].generated_tokens == alone(index, "finesteer-all") for name, index in names.items())


def test_rows_come_back_and_the_table_stops_growing(model, prompts):
    with engine(model, num_blocks=400, max_batch_tokens=2048) as manager:
        sizes = []
        for _ in range(4):
            with manager.pause():
                ids = [
                    manager.add_request(prompts[i % 6], steering="constant-generated", sampling=Sampling(logprobs=1))
                    for i in range(90)
                ]
            results(manager, ids)
            sizes.append(manager.session.table.capacity)
        assert sizes == [128] * 4 and manager.session.table.in_use == 0 and not manager.session.requests


def test_hooks_are_gone_with_the_last_request_of_a_block(model, prompts):
    before = dict(model._steering.site_hooks)
    with engine(model) as manager:
        with model.steering_with([ConstantVector("resid_pre[1]", torch.ones(32))]):
            name = manager.add_request(prompts[0])
        assert Site("resid_pre", 1) in model._steering.site_hooks
        results(manager, [name])
    assert dict(model._steering.site_hooks) == before


def test_an_engine_whose_model_lost_its_hooks_fails_and_says_why(prompts, alone):
    from finesteer_hf import SteeredModelForCausalLM
    from finesteer_hf.testing.toy import toy_model

    own = SteeredModelForCausalLM.from_model(toy_model())
    with engine(own) as manager:
        with own.steering_with([ConstantVector("resid_pre[1]", torch.ones(32))]):
            with manager.pause():
                name = manager.add_request(prompts[0])
                own._steering.site_hooks[Site("resid_pre", 1)][1].remove()
            error = results(manager, [name])[name].error
        assert "did not pass ['resid_pre[1]']" in error
        with pytest.raises(RuntimeError, match="fatal error"):
            manager.add_request(prompts[0])


def test_an_engine_without_the_seam_is_refused(model, monkeypatch):
    monkeypatch.delattr(cache.PagedAttentionCache, "search_prefix_match")
    monkeypatch.setattr(requests.FutureRequestState, "__slots__", ("state",))
    assert contract.problems() == [
        "PagedAttentionCache.search_prefix_match(request_id, prompt_ids)",
        "FutureRequestState.has_new_token",
        "FutureRequestState.query_length",
    ]
    with pytest.raises(UnsupportedModelError, match=r"search_prefix_match.*Install transformers"):
        model.generate_batch([[7]], max_new_tokens=1)


# transformers as it was before it had what serving builds on.
OLDER = """
import sys
from transformers import LlamaForCausalLM
for name in list(sys.modules):
    if name.startswith("transformers.generation.continuous_batching."):
        sys.modules[name] = None
import torch
from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.testing import toy_model
model = SteeredModelForCausalLM.from_model(toy_model())
assert model.generate(torch.tensor([[7]]), max_new_tokens=2).shape == (1, 3)
try:
    model.init_continuous_batching()
except UnsupportedModelError as error:
    print(error)
"""


def test_everything_but_serving_works_where_transformers_lacks_the_seam():
    found = subprocess.run([sys.executable, "-c", OLDER], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "it lacks continuous_api.ContinuousBatchingManager" in found.stdout and "use `generate`" in found.stdout
