"""The features: each `check_<feature>` compares a setting of `generate` or `forward` with one prompt at a time."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from transformers import CompileConfig, DynamicCache, GenerationConfig, TextIteratorStreamer
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from finesteer_hf.testing.bench import NEW_TOKENS, Bench
from finesteer_hf.testing.toy import toy_model, toy_tokenizer


# Outside every tested vocabulary.
NEVER_SAID = 1_000_000


def _same(got: Any, expected: Any, what: str) -> None:
    assert got == expected, f"{what}: got {got}, expected {expected}"


def _everything(bench: Bench) -> list[int]:
    return list(range(len(bench.prompts)))


def check_left_padding(bench: Bench) -> None:
    _same(bench.generate(_everything(bench)), bench.expected, "a left-padded batch differs from its rows alone")


def check_right_padded_forward(bench: Bench) -> None:
    with torch.no_grad(), bench.model.steering("a", scale=bench.scale):
        batch = bench.batch(_everything(bench), side="right")
        logits = bench.model(**batch).logits
        for index, prompt in enumerate(bench.prompts):
            alone = bench.model(input_ids=prompt[None]).logits[0]
            torch.testing.assert_close(logits[index, : len(prompt)], alone, atol=2e-4, rtol=2e-4)


def check_prompt_lengths(bench: Bench) -> None:
    """A forward over prompt and answer, with the prompt's length, gives the logits that `generate` used."""
    with torch.no_grad(), bench.model.steering("a", scale=bench.scale):
        for prompt, answer in zip(bench.prompts, bench.expected, strict=True):
            text = torch.cat([prompt, prompt.new_tensor(answer)])[None]
            logits = bench.model(input_ids=text, prompt_lengths=torch.tensor([len(prompt)])).logits[0]
            _same(logits[len(prompt) - 1 : -1].argmax(-1).tolist(), answer, "scoring disagrees with generating")


def check_beams(bench: Bench) -> None:
    alone = [bench.generate([i], num_beams=3, num_return_sequences=2) for i in _everything(bench)]
    together = bench.generate(_everything(bench), num_beams=3, num_return_sequences=2)
    _same(together, [row for rows in alone for row in rows], "beams of a batch differ from each query's own")


def check_num_return_sequences(bench: Bench) -> None:
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    expected = [row for row in bench.expected for _ in range(3)]
    _same(bench.generate(_everything(bench), **settings), expected, "returned sequences are steered differently")


def check_sampling(bench: Bench) -> None:
    def draw(**kwargs: Any) -> Any:
        torch.manual_seed(0)
        return bench.generate(_everything(bench), do_sample=True, temperature=0.7, **kwargs)

    _same(draw(), draw(steering={"a": 1.0}), "the same seed gives another sample")
    assert draw() != draw(steering=None), "sampling ignores the steering"


def check_no_cache(bench: Bench) -> None:
    _same(bench.generate(_everything(bench), use_cache=False), bench.expected, "without a cache the text differs")


def check_static_cache(bench: Bench) -> None:
    got = bench.generate(_everything(bench), cache_implementation="static", disable_compile=True)
    _same(got, bench.expected, "a static cache gives another text")


def check_chunked_prefill(bench: Bench) -> None:
    for size in (1, 3, 5, 100):
        got = bench.generate(_everything(bench), prefill_chunk_size=size)
        _same(got, bench.expected, f"prefill in chunks of {size} gives another text")


def check_prompt_lookup(bench: Bench) -> None:
    for index in _everything(bench):
        # Older versions of transformers look up nothing without an end of sequence; this one is never generated.
        got = bench.alone(index, prompt_lookup_num_tokens=3, eos_token_id=NEVER_SAID)
        _same(got, bench.expected[index], "prompt lookup gives another text")


def check_assisted(bench: Bench) -> None:
    """A plain assistant, and an assistant that is steered itself."""
    assistant = toy_model(seed=1)
    steered_assistant = copy.deepcopy(bench.model)
    for helper in (assistant, steered_assistant):
        for index in _everything(bench):
            got = bench.alone(index, assistant_model=helper)
            _same(got, bench.expected[index], "assisted decoding gives another text")


def check_carried_cache(bench: Bench) -> None:
    """A second turn on a cache gives the same text as the whole prompt in one call."""
    model, first, second = bench.model, bench.prompts[0][None], bench.prompts[1][None]
    both = torch.cat([first, second], dim=1)

    def fill() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), model.disable_steering():
            model(input_ids=first, past_key_values=cache, use_cache=True)
        return cache

    def say(**kwargs: Any) -> torch.Tensor:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
        return model.generate(input_ids=both, past_key_values=fill(), **settings)

    whole = say(steering_scale=bench.scale)
    # Older versions of transformers cannot do both at once, steered or not.
    if torch.equal(say(steering=None, prefill_chunk_size=3), say(steering=None)):
        chunked = say(steering_scale=bench.scale, prefill_chunk_size=3)
        _same(chunked.tolist(), whole.tolist(), "a carried cache and chunks give another text")
    with torch.no_grad():
        cache, text = fill(), second
        with model.steering("a", scale=bench.scale):
            tokens = []
            for _ in range(NEW_TOKENS):
                out = model(input_ids=text, past_key_values=cache, use_cache=True)
                text = out.logits[:, -1:].argmax(-1)
                tokens.append(int(text))
    _same(tokens, whole[0, both.shape[1] :].tolist(), "a hand-written decoding loop gives another text")


def check_guidance(bench: Bench) -> None:
    alone = [bench.alone(i, guidance_scale=1.5) for i in _everything(bench)]
    _same(bench.generate(_everything(bench), guidance_scale=1.5, inputs=None), alone, "guidance differs by batch")


def check_inputs_embeds(bench: Bench) -> None:
    for index in _everything(bench):
        embeds = bench.model.get_input_embeddings()(bench.prompts[index][None])
        _same(bench.generate([index], inputs={"inputs_embeds": embeds})[0], bench.expected[index], "embeddings differ")


def check_streaming(bench: Bench) -> None:
    tokenizer = toy_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    settings = {"streamer": streamer, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    thread = threading.Thread(
        target=bench.model.generate, args=(bench.prompts[0][None],), kwargs={"steering_scale": bench.scale, **settings}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    _same(text.split(), str(tokenizer.decode(bench.expected[0])).split(), "the stream shows another text")


def check_mixed_rows(bench: Bench) -> None:
    rows = ["a", None, {"a": 1.0}, None]
    expected = [bench.expected[0], bench.unsteered[1], bench.expected[2], bench.unsteered[3]]
    _same(bench.generate([0, 1, 2, 3], steering=rows), expected, "rows with and without steering mix")
    scales = [bench.scale, 0.0, 0.0, bench.scale]
    expected = [bench.expected[0], bench.unsteered[1], bench.unsteered[2], bench.expected[3]]
    _same(bench.generate([0, 1, 2, 3], steering_scale=scales), expected, "rows with different scales mix")


def check_mixed_rows_with_beams(bench: Bench) -> None:
    settings = {"num_beams": 3, "num_return_sequences": 2}
    steered, plain = bench.generate([0], **settings), bench.generate([1], steering=None, **settings)
    _same(bench.generate([0, 1], steering=["a", None], **settings), steered + plain, "beams of different rows mix")


def check_scale_zero(bench: Bench) -> None:
    inputs = bench.batch(_everything(bench))
    with torch.no_grad():
        with bench.model.disable_steering():
            base = bench.model(**inputs).logits
        with bench.model.steering("a", scale=0.0):
            assert torch.equal(bench.model(**inputs).logits, base), "scale 0 is not bit-identical to the base"
    _same(bench.generate(_everything(bench), steering_scale=0.0), bench.unsteered, "scale 0 steers")


def check_disable_and_nest(bench: Bench) -> None:
    model = bench.model
    with model.steering("a", scale=2.0):
        with model.disable_steering():
            _same(model.active_steering, {}, "something is active in a disabled block")
            with model.steering("a"):
                _same(model.active_steering, {"a": 1.0}, "a nested block")
        _same(model.active_steering, {"a": 2.0}, "the outer block is not restored")
    _same(model.active_steering, {"a": 1.0}, "the set selection is not restored")


def check_unload(bench: Bench) -> None:
    reference = toy_model().to(bench.model.device)
    reference.load_state_dict(bench.model.state_dict())
    reference.set_attn_implementation(bench.model.config._attn_implementation)
    bench.model.unload_steering()
    assert type(bench.model) is type(reference), "the class is not restored"
    hooks = [m for m in bench.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, f"hooks are left on {hooks}"
    inputs = bench.batch(_everything(bench))
    with torch.no_grad():
        assert torch.equal(bench.model(**inputs).logits, reference(**inputs).logits), "unloaded is not the base"


def check_output_steering(bench: Bench) -> None:
    _check_records(bench, do_sample=True)


def check_output_steering_of_beams(bench: Bench) -> None:
    _check_records(bench, do_sample=False, num_beams=3)


def _check_records(bench: Bench, **settings: Any) -> None:
    """Check that there is one entry for each returned sequence."""
    inputs = bench.batch(_everything(bench))
    rows = len(bench.prompts)
    out = bench.model.generate(
        **inputs,
        num_return_sequences=2,
        max_new_tokens=2,
        return_dict_in_generate=True,
        output_steering=True,
        **settings,
    )
    assert list(out.steering) in (["a"], []), f"out.steering names {list(out.steering)}"
    for name, value in out.steering.get("a", {}).items():
        assert len(value) == rows * 2, f"{name!r} has {len(value)} entries for {rows * 2} sequences"


def check_threads(bench: Bench) -> None:
    """Threads with different steering on one model each get their own answer."""
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        index = number % len(bench.prompts)
        results[number] = bench.alone(index, **({} if number % 2 else {"steering": None}))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        expected = bench.expected if number % 2 else bench.unsteered
        _same(results.get(number), expected[number % len(bench.prompts)], "a thread got another's steering")


def check_deepcopy(bench: Bench) -> None:
    twin = copy.deepcopy(bench.model)
    bench.model.delete_steering("a")
    other = Bench(twin, bench.prompts, bench.scale, bench.expected, bench.unsteered)
    _same([other.alone(i) for i in _everything(bench)], bench.expected, "a copy steers differently")


def check_continuous_batching(bench: Bench) -> None:
    """Packed with others, steered and not, each prompt gives its own answer."""
    prompts = [prompt.tolist() for prompt in bench.prompts]
    # Small: left alone an engine takes most of the machine's memory. In chunks of 16 tokens.
    config = ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=16)
    generation = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    steering = [{"a": bench.scale}, None] * len(prompts)
    twice = [prompt for prompt in prompts for _ in range(2)]
    out = bench.model.generate_batch(twice, generation, config, steering=steering)
    answers = [output.generated_tokens for output in out.values()]
    _same(answers[::2], bench.expected, "packed with others, a prompt gives another answer")
    unsteered = [bench.generate([i], steering=None)[0] for i in _everything(bench)]
    _same(answers[1::2], unsteered, "packed with steered ones, an unsteered prompt gives another answer")


def check_compiled_static_cache(bench: Bench) -> None:
    config = CompileConfig(fullgraph=True, mode="default", backend="eager")
    config._compile_all_devices = True  # type: ignore[assignment]
    torch._dynamo.reset()
    settings = {"cache_implementation": "static", "compile_config": config}
    _same(bench.generate(_everything(bench), **settings), bench.expected, "compiled decoding gives another text")
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = bench.generate(_everything(bench), steering=None, **settings)
    _same(got, bench.unsteered, "switching steering off in a compiled model")


def check_half_precision(bench: Bench) -> None:
    model = copy.deepcopy(bench.model).to(torch.bfloat16)
    half = Bench(model, bench.prompts, bench.scale, [], [])
    alone = [half.alone(i) for i in range(1)]
    _same(half.generate([0, 0]), alone * 2, "bfloat16 rows differ")
