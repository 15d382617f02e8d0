"""A processor with `query_pool="mean"` gets the unsteered mean over each prompt, however it is run."""

import pytest
import torch
from transformers import DynamicCache

from finesteer_hf import (
    ConstantVector,
    Decision,
    Site,
    SteeredModelForCausalLM,
    SteeringProcessor,
    SteeringProcessorList,
)
from finesteer_hf.fitting.answers import QueryRecorder, answer_logits
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.testing import toy_model


READS = (Site("resid_post", 0), Site("resid_post", 1))
SETTINGS = {"max_new_tokens": 5, "do_sample": False}


class Seeing(SteeringProcessor):
    """Keeps its queries, and adds a multiple of them after its reads."""

    reads = READS
    writes = (Site("resid_post", 2),)
    query_pool = "mean"

    def __init__(self, positions="all"):
        self.positions = positions
        self.seen = []

    def decide(self, queries):
        self.seen.append({site: queries[site] for site in self.reads})
        return Decision(vectors={self.writes[0]: 3 * queries[self.reads[1]]})


class SeeingLast(Seeing):
    query_pool = "last"


@pytest.fixture
def model():
    return SteeredModelForCausalLM.from_model(toy_model())


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 54, (length,), generator=generator) for length in (7, 4, 9, 6)]


def streams(prompt):
    """States of a prompt alone, `{site: [tokens, 32]}`."""
    with torch.no_grad():
        hidden = toy_model()(prompt[None], output_hidden_states=True).hidden_states
    return {site: hidden[site.layer + 1][0] for site in READS}


def padded(prompts, side):
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        where = slice(width - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def check(processor, prompts):
    """It was asked once, with the means of the prompts alone."""
    (seen,) = processor.seen
    for site in READS:
        expected = torch.stack([streams(prompt)[site].mean(0) for prompt in prompts])
        torch.testing.assert_close(seen[site], expected, atol=1e-4, rtol=1e-4)
    processor.seen.clear()


def generate(model, processors, **inputs):
    return model.generate(**inputs, steering_processor=SteeringProcessorList(processors), **SETTINGS)


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_of_a_batch_of_mixed_lengths_whole_and_in_chunks(model, prompts, positions, chunk):
    processor = Seeing(positions)
    inputs = padded(prompts, "left")
    said = generate(model, [processor], **inputs, prefill_chunk_size=chunk)
    check(processor, prompts)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [processor], input_ids=prompt[None])
        assert said[row, inputs["input_ids"].shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


def test_of_the_prompt_alone_where_a_forward_holds_answers_too(model, prompts):
    processor = Seeing()
    lengths = [3, 4, 5, 2]
    with model.steering_with(SteeringProcessorList([processor])):
        model(**padded(prompts, "right"), prompt_lengths=lengths)
    check(processor, [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)])


def test_of_the_unsteered_prompt_though_another_processor_writes_first(model, prompts):
    first = ConstantVector(Site("resid_post", 0), torch.full((32,), 5.0))
    for chunk in (None, 3):
        processor, last = Seeing(), SeeingLast()
        generate(model, [first, processor, last], **padded(prompts, "left"), prefill_chunk_size=chunk)
        check(processor, prompts)
        # Beside it, what reads the last token gets that.
        for site in READS:
            expected = torch.stack([streams(prompt)[site][-1] for prompt in prompts])
            torch.testing.assert_close(last.seen[0][site], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [None, 3])
def test_of_the_whole_text_where_a_cache_holds_its_beginning(model, prompts, chunk):
    whole = torch.cat([prompts[0], prompts[2]])

    def held():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompts[0][None], past_key_values=cache, use_cache=True)
        return cache

    processor = Seeing("generated")
    said = generate(model, [processor], input_ids=whole[None], past_key_values=held(), prefill_chunk_size=chunk)
    check(processor, [whole])
    # Nothing of the prompt is steered, so it makes no difference where its beginning came from.
    assert said.tolist() == generate(model, [processor], input_ids=whole[None]).tolist()


def test_a_prompt_run_in_another_call_is_refused(model, prompts):
    processor, cache = Seeing(), DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompts[0][None], past_key_values=cache, use_cache=True)
    before = cache.layers[0].keys.clone()
    with (
        model.steering_with(SteeringProcessorList([processor])),
        pytest.raises(ValueError, match="whole text as `input_ids`"),
    ):
        model(prompts[2][None], past_key_values=cache, use_cache=True)
    assert not processor.seen
    assert torch.equal(cache.layers[0].keys, before)


def test_of_beams_and_drafts(model, prompts):
    processor = Seeing()
    generate(model, [processor], **padded(prompts[:2], "left"), num_beams=3)
    check(processor, [prompt for prompt in prompts[:2] for _ in range(3)])
    drafted = generate(model, [processor], input_ids=prompts[0][None], prompt_lookup_num_tokens=3)
    check(processor, prompts[:1])
    assert drafted.tolist() == generate(model, [processor], input_ids=prompts[0][None]).tolist()


def test_in_a_compiled_forward(model, prompts):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = padded(prompts, "right")
    for lengths in (None, torch.tensor([3, 4, 5, 2])):
        with model.steering_with(SteeringProcessorList([ByMean()])), torch.no_grad():
            expected = model(**inputs, prompt_lengths=lengths).logits
            found = compiled(**inputs, prompt_lengths=lengths).logits
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


class ByMean(SteeringProcessor):
    """Adds a multiple of the mean; keeps nothing, so that a graph holds it."""

    reads = READS[:1]
    writes = (Site("resid_post", 2),)
    query_pool = "mean"

    def decide(self, queries):
        return Decision(vectors={self.writes[0]: 3 * queries[self.reads[0]]})


def test_cached_prompts_and_recorded_queries_give_it_the_whole_prompt(model, prompts):
    """A fit runs texts after cached prompts; a mean still covers the whole prompt."""
    passages = [Passage((*prompt.tolist(), 7, 8), len(prompt)) for prompt in prompts]
    processor, cache = Seeing("generated"), PromptCache(model)
    list(answer_logits(model, passages, [processor], cache))
    check(processor, prompts)
    assert cache.prompts == 0
    recorder = QueryRecorder(passages, [processor])
    list(answer_logits(model, passages, [recorder], cache))
    recorder.steered_by(processor)
    check(processor, prompts)
