"""An entry's `decide` runs once per call, for any number of write sites, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, DynamicCache

from finesteer_hf import ConstantVector
from finesteer_hf.processors import Decision, SteeringProcessor, SteeringProcessorList
from finesteer_hf.sites import Site


WIDTH = 32
SITES = tuple(Site("resid_post", layer) for layer in range(3))


class Everywhere(SteeringProcessor):
    """Writes at all sites; `asked` counts the calls of `decide` outside of graphs, `erfinv` marks them inside."""

    def __init__(self, reads: tuple[Site, ...] = (), gated: bool = False, positions: str = "all") -> None:
        self.reads, self.writes, self.gated, self.positions = reads, SITES, gated, positions
        self.asked = 0

    def decide(self, queries):
        if not torch.compiler.is_compiling():
            self.asked += 1
        state = queries[self.reads[0]] if self.reads else torch.linspace(-1, 1, WIDTH, device=queries.device)[None]
        vector = torch.erfinv(0.9 * torch.tanh(state @ torch.ones(WIDTH, WIDTH).triu()))
        return Decision(dict.fromkeys(self.writes, vector), gate=(state[:, 0] > 0).float() if self.gated else None)


class Marks:
    """A backend that runs graphs as they are; notes for each run how many decisions are in the graph."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def __deepcopy__(self, memo):
        return self

    def __call__(self, graph, inputs):
        marks = sum(node.target is torch.erfinv for node in graph.graph.nodes)

        def run(*args):
            self.runs.append(marks)
            return graph(*args)

        return run


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()


@pytest.fixture
def inputs():
    ids = torch.randint(6, 54, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def entries():
    return [Everywhere(), Everywhere(SITES[:1]), Everywhere(SITES[:1], gated=True, positions="generated")]


def compiled_steps():
    marks = Marks()
    config = CompileConfig(fullgraph=True, mode="default", backend=marks)
    config._compile_all_devices = True
    return marks, {"cache_implementation": "static", "compile_config": config}


def test_once_per_call_of_generate(model, inputs):
    eager, compiled = entries(), entries()
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **settings, steering_processor=eager)
    marks, static = compiled_steps()
    found = model.generate(**inputs, **settings, **static, steering_processor=compiled)
    assert marks.runs == [0] * 4, "four compiled steps, which take over what was decided"
    assert [entry.asked for entry in eager] == [entry.asked for entry in compiled] == [1, 1, 1]
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(**inputs, **settings, steering=None))


def test_once_per_compiled_forward(model, inputs):
    marks = Marks()
    with model.steering_with(SteeringProcessorList(entries())):
        expected = model(**inputs).logits
        found = torch.compile(model, backend=marks, fullgraph=True)(**inputs).logits
    assert marks.runs == [len(entries())]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real])


def test_a_compiled_forward_merges_what_entries_add(model, inputs):
    """Bit-identical, with gradients: the decision is not part of training."""
    chain = [ConstantVector(SITES[1], torch.linspace(-1, 1, WIDTH), strength=0.3), Everywhere(SITES[:1], gated=True)]
    chain[1].writes = SITES[1:]
    real = inputs["attention_mask"].bool()
    results = []
    with model.steering_with(SteeringProcessorList(chain)):
        for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
            model.zero_grad()
            logits = call(**inputs).logits[real]
            logits.square().mean().backward()
            results.append((logits.detach(), model.get_input_embeddings().weight.grad.clone()))
    (expected, gradient), (found, compiled_gradient) = results
    assert torch.equal(found, expected)
    assert torch.equal(compiled_gradient, gradient)


def test_a_late_reader_joins_what_a_chunk_before_it_adds(model, inputs):
    """A chunk that ends before the query knows only the constant; from the query on both are added."""
    ids = inputs["input_ids"]

    def said(**kwargs):
        late = Everywhere(SITES[:1], positions="generated")
        chain = [ConstantVector(SITES[1], torch.linspace(-1, 1, WIDTH)), late]
        return model.generate(
            input_ids=ids, max_new_tokens=1, do_sample=False, steering_processor=chain, output_scores=True,
            return_dict_in_generate=True, **kwargs,
        ).scores[0]  # fmt: skip

    torch.testing.assert_close(said(prefill_chunk_size=3), said(), atol=1e-5, rtol=1e-5)


class Precise(SteeringProcessor):
    """Decides by a product that half precision would round; as it writes, it says in what it was taken."""

    reads = SITES[:1]
    writes = SITES[:2]

    def decide(self, queries):
        product = queries[self.reads[0]] @ torch.eye(WIDTH)
        return Decision(dict.fromkeys(self.writes, torch.full((1, WIDTH), float(product.element_size()))))


def test_a_compiled_forward_decides_outside_of_autocast(model, inputs):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with model.steering_with(SteeringProcessorList([Precise()])), torch.autocast("cpu", torch.bfloat16):
        expected, found = model(**inputs).logits, compiled(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.equal(found[real], expected[real])


@pytest.mark.slow
def test_a_decision_outlives_a_graph_that_breaks(model, inputs):
    class Breaks(Everywhere):
        def decide(self, queries):
            torch._dynamo.graph_break()
            return super().decide(queries)

    marks = Marks()
    with model.steering_with(SteeringProcessorList([Breaks(SITES[:1])])):
        expected = model(**inputs).logits
        found = torch.compile(model, backend=marks)(**inputs).logits
    assert sum(marks.runs) == 1
    real = inputs["attention_mask"].bool()
    assert torch.equal(found[real], expected[real])


def test_once_a_hand_written_decoding_loop(model, inputs):
    """On a model that is compiled in place: the forward over the prompt decides, and its cache takes that along."""
    marks, processors = Marks(), entries()

    def loop():
        cache, mask, ids = DynamicCache(config=model.config), inputs["attention_mask"], inputs["input_ids"]
        scores = []
        with torch.no_grad(), model.steering_with(SteeringProcessorList(processors)):
            for token in range(3):
                out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
                scores.append(out.logits[:, -1])
                ids, mask = torch.full((3, 1), 9 + token), torch.nn.functional.pad(mask, (0, 1), value=1)
        return torch.stack(scores)

    expected = loop()
    model.compile(backend=marks)
    torch.testing.assert_close(loop(), expected)
    assert marks.runs and not any(marks.runs)
    assert [entry.asked for entry in processors] == [2, 2, 2], "one call was eager, one compiled"
