"""Errors and interrupts anywhere in a call leave nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from steered_tiny import greedy, hooks_of, query_shift, some_prompts, steer_tiny, tiny_llama

from finesteer_hf.errors import AdapterNotFoundError
from finesteer_hf.processors import Decision, QueryStates, SteeringProcessor, TokenView
from finesteer_hf.runtime.blocks import BLOCK
from finesteer_hf.runtime.current import CURRENT
from finesteer_hf.runtime.forwards.prompt_ends import NOT_TOLD, PROMPT_ENDS
from finesteer_hf.runtime.session import CallSession
from finesteer_hf.sites import Site


class Injected(RuntimeError):
    pass


class Failing(SteeringProcessor):
    """Fails in `decide`, in `transform` or in `logits_processors`, once it has been told to."""

    reads = (Site("resid_post", 1),)
    writes = (Site("resid_post", 1),)
    maps = (Site("resid_post", 2),)

    def __init__(self, where: str, error: type[BaseException]) -> None:
        self.where, self.error = where, error

    def decide(self, queries: QueryStates) -> Decision:
        self._fail("decide")
        return Decision({self.writes[0]: torch.ones(1, 32)})

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        self._fail("transform")
        return hidden * 1.1

    def logits_processors(self, scale: torch.Tensor | float) -> list[Any]:
        self._fail("logits_processors")
        return []

    def _fail(self, here: str) -> None:
        if here == self.where:
            raise self.error("injected")


def raising(error: type[BaseException], after: int = 0) -> Callable[..., None]:
    """A function that raises at call number `after`."""
    calls = iter(range(after + 1))

    def fail(*args: Any, **kwargs: Any) -> None:
        if next(calls) == after:
            raise error("injected")

    return fail


@contextlib.contextmanager
def injected(model: Any, where: str, error: type[BaseException], after: int) -> Iterator[None]:
    """Let something in the model or the run time fail."""
    block, decoder = model.model.layers[2], model.model
    fail = raising(error, after)
    with pytest.MonkeyPatch.context() as patch:
        if where == "decoder pre-hook":
            remove = decoder.register_forward_pre_hook(fail).remove
        elif where == "decoder post-hook":
            remove = decoder.register_forward_hook(fail).remove
        elif where == "block pre-hook":
            remove = block.register_forward_pre_hook(fail).remove
        elif where == "block post-hook":
            remove = block.register_forward_hook(fail).remove
        elif where == "forward":
            inner = block.mlp.forward
            patch.setattr(block.mlp, "forward", lambda *args: fail() or inner(*args))
            remove = contextlib.nullcontext
        elif where in ("begin_forward", "visit", "_new_stream"):
            inner = getattr(CallSession, where)
            patch.setattr(CallSession, where, lambda *args: fail() or inner(*args))
            remove = contextlib.nullcontext
        else:
            remove = contextlib.nullcontext
        try:
            yield
        finally:
            remove()


MODEL_PLACES = [
    "decoder pre-hook",
    "decoder post-hook",
    "block pre-hook",
    "block post-hook",
    "forward",
    "begin_forward",
    "visit",
    "_new_stream",
]


def assert_nothing_left(model: Any, hooks: dict[str, int]) -> None:
    assert PROMPT_ENDS.get() is NOT_TOLD
    assert BLOCK.get() is None
    assert hooks_of(model) == hooks


def calls_of(model: Any, ids: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    def plain(**kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, **kwargs).logits

    return {
        "generate": lambda **kwargs: greedy(model, ids, max_new_tokens=4, **kwargs),
        "forward": plain,
        "forward with prompt_lengths": lambda: plain(prompt_lengths=torch.tensor([3, 5])),
        "two passes": lambda: greedy(model, ids, max_new_tokens=4, steering="b"),
    }


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("where", MODEL_PLACES)
def test_a_failing_model_leaves_nothing_behind(where: str, error: type[BaseException]) -> None:
    ids = some_prompts()
    model = steer_tiny(
        tiny_llama(), query_shift("resid_post[2]"), query_shift("resid_pre[1]", "resid_post[2]", seed=2)
    )
    calls = calls_of(model, ids)
    want = {name: call() for name, call in calls.items()}
    hooks = hooks_of(model)
    for name, call in calls.items():
        for after in (0, 2) if name == "generate" and where != "_new_stream" else (0,):
            with injected(model, where, error, after), pytest.raises(error):
                call()
            assert_nothing_left(model, hooks)
            assert CURRENT.get() is None
            for later in calls:
                assert torch.equal(calls[later](), want[later]), (name, later)
            assert CURRENT.get() is None


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["decide", "transform", "logits_processors"])
def test_a_failing_processor_leaves_nothing_behind(where: str, error: type[BaseException]) -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift("resid_post[2]"))
    calls = calls_of(model, ids)
    del calls["two passes"]
    want = {name: call() for name, call in calls.items()}
    hooks = hooks_of(model)
    with pytest.raises(error):
        calls["generate"](steering_processor=[Failing(where, error)])
    assert_nothing_left(model, hooks)
    assert CURRENT.get() is None
    with pytest.raises(error):
        with model.steering_with([Failing(where, error)]):
            for call in reversed(calls.values()):
                call()
    assert_nothing_left(model, hooks)
    for name, call in calls.items():
        assert torch.equal(call(), want[name])
    assert CURRENT.get() is None


def test_an_interrupted_forward_does_not_steer_the_next_call() -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift("resid_post[2]"))
    with model.disable_steering():
        unsteered, logits = greedy(model, ids), model(input_ids=ids).logits
    with injected(model, "forward", KeyboardInterrupt, 0), pytest.raises(KeyboardInterrupt):
        model(input_ids=ids)
    model.set_steering(None)
    assert torch.equal(greedy(model, ids), unsteered)
    with injected(model, "forward", KeyboardInterrupt, 0), pytest.raises(KeyboardInterrupt), model.steering("a"):
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_blocks_nest_and_restore_after_errors() -> None:
    model = steer_tiny(tiny_llama(), query_shift(), query_shift("head_out[1]", seed=2))
    model.set_steering({"b": 0.5})
    with model.steering("a", scale=2.0):
        assert model.active_steering == {"a": 2.0}
        with pytest.raises(Injected), model.steering(["a", "b"]):
            with model.disable_steering():
                assert model.active_steering == {}
                with pytest.raises(AdapterNotFoundError), model.steering("missing"):
                    pass
                assert model.active_steering == {}
            assert model.active_steering == {"a": 1.0, "b": 1.0}
            raise Injected
        assert model.active_steering == {"a": 2.0}
    assert model.active_steering == {"b": 0.5}


def test_blocks_of_two_models_are_independent() -> None:
    one, two = steer_tiny(tiny_llama(), query_shift()), steer_tiny(tiny_llama(seed=1), query_shift())
    with one.disable_steering():
        assert one.active_steering == {} and two.active_steering == {"a": 1.0}
        with two.steering({"a": 3.0}):
            assert one.active_steering == {} and two.active_steering == {"a": 3.0}
        assert two.active_steering == {"a": 1.0}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"steering": "missing"}, AdapterNotFoundError),
        ({"steering": ["a", "missing"]}, AdapterNotFoundError),
        ({"steering": ["a", "a", "a"]}, ValueError),
        ({"steering_scale": [1.0, 2.0, 3.0]}, ValueError),
        ({"output_steering": True}, ValueError),
        ({"not_an_argument": 1}, ValueError),
        ({"steering_processor": [object()]}, TypeError),
    ],
)
def test_refused_calls_leave_nothing_behind(arguments: dict[str, Any], error: type[Exception]) -> None:
    ids = some_prompts()
    model = steer_tiny(tiny_llama(), query_shift())
    want, hooks = greedy(model, ids), hooks_of(model)
    with pytest.raises(error):
        greedy(model, ids, **arguments)
    assert_nothing_left(model, hooks)
    assert CURRENT.get() is None
    assert torch.equal(greedy(model, ids), want)
