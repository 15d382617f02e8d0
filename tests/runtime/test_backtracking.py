"""Backtracking is token-identical to generating again from the shortened prefix, and computes nothing twice."""

import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, MistralConfig, MistralForCausalLM, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from finesteer_hf import SteeredModelForCausalLM, SteeringProcessor
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.toy import toy_model, toy_tokenizer


NEW = 12
# Half of the vocabulary, which a row may not use any more once it has gone back.
BANNED = list(range(6, 54, 2))
LENGTHS = (7, 4, 9, 6)
# For each row: with how many tokens it goes back, and by how many. Row 2 restarts from its prompt, row 3 never does.
PLANS = {0: (5, 3), 1: (9, 4), 2: (6, 6), 3: (99, 1)}


class GoBack(SteeringProcessor):
    """Row r drops `plans[r][1]` tokens when it has `plans[r][0]`, and continues without the banned words."""

    lookback = 6

    def __init__(self, plans):
        self.when, self.drop = (torch.tensor(part) for part in zip(*plans, strict=True))
        self.went = torch.zeros(len(plans), dtype=torch.bool)

    def watch(self, step):
        now = step.active & ~self.went & (step.new_tokens == self.when)
        self.went |= now
        return torch.where(now, self.drop, 0)

    def logits_processors(self, scale):
        went = self.went

        class Ban(LogitsProcessor):
            def __call__(self, ids, scores):
                banned = torch.zeros_like(scores, dtype=torch.bool)
                banned[:, BANNED] = True
                return scores.masked_fill(banned & went[:, None], -torch.inf)

        return [Ban()]


class Collect(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def steered(model=None):
    model = toy_model() if model is None else model
    SteeredModelForCausalLM.from_model(model)
    return bench_of(model)


def bench_of(model):
    generator = torch.Generator().manual_seed(3)
    return Bench(model, [torch.randint(6, 54, (n,), generator=generator) for n in LENGTHS], 1.0, [], [])


def generate(bench, rows, plans=None, **kwargs):
    plans = [PLANS[row] for row in rows] if plans is None else plans
    settings = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return bench.model.generate(**bench.batch(rows), steering_processor=[GoBack(plans)], **settings)


def new_tokens(bench, rows, out):
    width = bench.batch(rows)["input_ids"].shape[1]
    return [row[width:].tolist() for row in out]


def reference(bench, row, eos=None, **kwargs):
    """Generate, cut, generate again, with transformers alone."""
    when, drop = PLANS[row]
    prompt = bench.prompts[row][None]
    settings = {"do_sample": False, "eos_token_id": eos, "pad_token_id": 0, **kwargs}
    with bench.model.disable_steering():
        first = bench.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, **settings)
        if first.shape[1] - prompt.shape[1] < when:
            return first[0, prompt.shape[1] :].tolist()
        if "min_new_tokens" in settings:
            settings["min_new_tokens"] = max(0, settings["min_new_tokens"] - (when - drop))
        kept = first[:, : prompt.shape[1] + when - drop]
        again = bench.model.generate(
            kept,
            attention_mask=torch.ones_like(kept),
            max_new_tokens=NEW - (when - drop),
            suppress_tokens=BANNED,
            **settings,
        )
    return again[0, prompt.shape[1] :].tolist()


@pytest.fixture(scope="module")
def bench():
    return steered()


@pytest.mark.parametrize("row", PLANS)
def test_a_row_alone_is_what_generating_from_the_shortened_prefix_gives(bench, row):
    assert new_tokens(bench, [row], generate(bench, [row]))[0] == reference(bench, row)


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}])
def test_rows_of_a_batch_go_back_independently(bench, kwargs):
    rows = list(PLANS)
    expected = [reference(bench, row) for row in rows]
    assert new_tokens(bench, rows, generate(bench, rows, **kwargs)) == expected
    assert new_tokens(bench, rows[::-1], generate(bench, rows[::-1], **kwargs)) == expected[::-1]


def test_rows_that_ended_stay_ended_and_are_padded_at_the_right(bench):
    rows = list(PLANS)
    eos = reference(bench, 3)[2]
    expected = [reference(bench, row, eos) for row in rows]
    assert len({len(row) for row in expected}) > 1, "no row ends early, so nothing is tested"
    longest = max(map(len, expected))
    got = new_tokens(bench, rows, generate(bench, rows, eos_token_id=eos, pad_token_id=0))
    assert got == [row + [0] * (longest - len(row)) for row in expected]


def test_limits_and_penalties_count_a_rows_own_tokens(bench):
    """A row that moved right has more left padding, not a longer text."""
    rows = list(PLANS)
    eos = reference(bench, 0)[3]
    # Older versions of transformers count pads as said before, which a row alone has not; so nobody says a pad.
    settings = {"min_new_tokens": 8, "repetition_penalty": 1.3, "sequence_bias": {(0,): -1e4}}
    expected = [reference(bench, row, eos, **settings) for row in rows]
    alone = [
        new_tokens(bench, [row], generate(bench, [row], eos_token_id=eos, pad_token_id=0, **settings))[0]
        for row in rows
    ]
    assert alone == expected
    got = new_tokens(bench, rows, generate(bench, rows, eos_token_id=eos, pad_token_id=0, **settings))
    assert got == [row + [0] * (max(map(len, expected)) - len(row)) for row in expected]


def test_kept_tokens_are_not_computed_again(bench):
    tokens = []
    handle = bench.model.model.embed_tokens.register_forward_pre_hook(lambda m, args: tokens.append(args[0].shape[1]))
    generate(bench, [0])
    handle.remove()
    when, drop = PLANS[0]
    # The prompt; each token but the newest when the row goes back; from there one column a token.
    assert tokens == [LENGTHS[0], *[1] * (when - 1), *[1] * (NEW - (when - drop))]


def test_the_cache_and_the_scores_belong_to_what_is_returned(bench):
    rows = list(PLANS)
    out = generate(bench, rows, return_dict_in_generate=True, output_scores=True, output_logits=True)
    ids, width = out.sequences, bench.batch(rows)["input_ids"].shape[1]
    assert len(out.scores) == len(out.logits) == NEW
    assert torch.equal(torch.stack(out.scores, 1).argmax(-1), ids[:, width:])
    mask = torch.cat([bench.batch(rows)["attention_mask"], torch.ones(len(rows), NEW, dtype=torch.long)], dim=1)
    with torch.no_grad(), bench.model.disable_steering():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        whole = bench.model(input_ids=ids, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(torch.stack(out.logits, 1), whole.logits[:, width - 1 : -1], atol=1e-4, rtol=1e-4)
    for mine, full in zip(out.past_key_values.layers, whole.past_key_values.layers, strict=True):
        real = mask[:, :-1].bool()[:, None, :, None]
        assert mine.keys.shape[-2] == ids.shape[1] - 1
        torch.testing.assert_close(mine.keys * real, full.keys[:, :, :-1] * real, atol=1e-4, rtol=1e-4)


def test_returned_sequences_and_sampling(bench):
    """With one candidate a draw is the greedy choice; with more, a seed still gives one text."""
    expected = [reference(bench, row) for row in (0, 0, 1, 1)]
    plans = [PLANS[row] for row in (0, 0, 1, 1)]
    out = generate(bench, [0, 1], plans, do_sample=True, top_k=1, num_return_sequences=2)
    assert new_tokens(bench, [0, 1], out) == expected

    def draw():
        torch.manual_seed(5)
        return generate(bench, [0, 1], do_sample=True, temperature=1.5).tolist()

    assert draw() == draw()


def test_a_carried_cache_is_cut_as_well(bench):
    first, second = bench.prompts[0][None], bench.prompts[2][None]
    both = torch.cat([first, second], dim=1)
    plain = bench.model.generate(
        both, steering_processor=[GoBack([(6, 6)])], max_new_tokens=NEW, attention_mask=torch.ones_like(both)
    )
    for ids in (both, second):
        cache = DynamicCache(config=bench.model.config)
        with torch.no_grad(), bench.model.disable_steering():
            bench.model(input_ids=first, past_key_values=cache, use_cache=True)
        got = bench.model.generate(
            ids,
            attention_mask=torch.ones_like(both),
            past_key_values=cache,
            steering_processor=[GoBack([(6, 6)])],
            max_new_tokens=NEW,
        )
        assert got[0, ids.shape[1] :].tolist() == plain[0, both.shape[1] :].tolist()
        assert cache.get_seq_length() == both.shape[1] + NEW - 1


@pytest.mark.parametrize("window", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_a_cache_with_a_window_is_read_again_once_it_has_forgotten(window):
    config = MistralConfig(
        vocab_size=54,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.3,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    bench = steered(MistralForCausalLM(config).eval())
    rows = list(PLANS)
    expected = [reference(bench, row) for row in rows]
    assert [new_tokens(bench, [row], generate(bench, [row]))[0] for row in rows] == expected
    assert new_tokens(bench, rows, generate(bench, rows)) == expected


def test_a_stream_never_shows_what_is_taken_back(bench):
    tokenizer = toy_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    seen = []
    thread = threading.Thread(target=generate, args=(bench, [0]), kwargs={"streamer": streamer})
    thread.start()
    seen = "".join(streamer)
    thread.join()
    assert seen.split() == tokenizer.decode(reference(bench, 0)).split()


def test_unsupported_settings_are_refused_before_anything_runs(bench):
    calls = []
    handle = bench.model.model.register_forward_pre_hook(lambda m, args: calls.append(1))
    embeds = bench.model.get_input_embeddings()(bench.prompts[0][None])
    for settings in (
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"guidance_scale": 1.5},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"inputs_embeds": embeds},
    ):
        with pytest.raises(ValueError, match="takes generated tokens back"):
            generate(bench, [0], **settings)
    with pytest.raises(ValueError, match="one row at a time, got 2"):
        generate(bench, [0, 1], streamer=Collect())
    handle.remove()
    assert not calls


def test_a_hand_written_loop_is_refused(bench):
    with torch.no_grad(), bench.model.steering_with([GoBack([(2, 1)])]):
        out = bench.model(input_ids=bench.prompts[0][None], use_cache=True)
        with pytest.raises(ValueError, match="only `generate` can do"):
            bench.model(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values)


def test_dropping_more_than_there_is_is_an_error(bench):
    with pytest.raises(ValueError, match=r"drops \[5\] tokens of rows that have \[2\]"):
        generate(bench, [0], [(2, 5)])
