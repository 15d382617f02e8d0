"""What a packed batch can serve. Everything is looked at before a request is queued: an error in the engine's own thread
would end every request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.runtime.plan import Plan
from finesteer_hf.sites import TextTower


# The cache's name for layers that attend within a window, as in a config's `layer_types`.
SLIDING_ATTENTION = "sliding_attention"


def check_plan(plan: Plan, tower: TextTower | None) -> None:
    """Raise `UnsupportedModelError` for steering that a packed batch cannot do, by name and with what to use instead.

    Args:
        plan: what would steer.
        tower: the model's; None where there is no model yet, and only the processors are looked at.
    """
    for entry in plan.entries:
        reason = not_served(entry.processor)
        if reason is not None:
            raise UnsupportedModelError(
                f"{entry.name!r} ({type(entry.processor).__name__}) cannot be served by continuous batching: {reason} Use "
                f"`generate(steering={entry.name!r})` for it; adapters that add one vector a query, as "
                "FineSteer's, CAA's and ITI's do, can be served."
            )
        if tower is not None:
            for site in entry.processor.sites:
                tower.check(site)


def not_served(processor: SteeringProcessor) -> str | None:
    """Why a packed batch cannot steer with a processor; None if it can."""
    if processor.lookback:
        return "it takes generated tokens back, and the engine's cache only grows."
    if type(processor).contrast_processors is not SteeringProcessor.contrast_processors:
        return "it compares with the unsteered model, which would need a second sequence beside each request."
    if processor.maps:
        return "it maps the state of each token by itself, and a packed batch adds one vector for each request."
    if any(site.kind == "attention" for site in processor.reads):
        return "it reads attention weights, and paged attention gives none."
    return None


def check_engine(config: Any) -> None:
    """Raise `UnsupportedModelError` if an engine runs the model where Python hooks do not.

    Args:
        config: the engine's resolved `ContinuousBatchingConfig`.
    """
    graphs = config.use_cuda_graph
    on = {
        "use_cuda_graph": any(graphs) if isinstance(graphs, tuple) else bool(graphs),
        "use_async_batching": bool(config.use_async_batching),
        "varlen_compile_config": config.varlen_compile_config is not None,
        "decode_compile_config": config.decode_compile_config is not None,
    }
    asked = [name for name, value in on.items() if value]
    if asked:
        raise UnsupportedModelError(
            f"This engine was created with {', '.join(asked)}. Graphs and compiled steps are recorded once and replayed "
            "without the hooks that steer, so requests would go unsteered. Leave these settings out of "
            "ContinuousBatchingConfig (they are then off on a steered model), or send unsteered requests only."
        )


def room(
    input_ids: Sequence[int], max_new_tokens: int | None, vocabulary: int, limits: Mapping[str, int | None]
) -> int:
    """How many new tokens a request may have, at most what it asks for.

    Args:
        input_ids: the prompt.
        max_new_tokens: what it asks for; None: all that fits.
        vocabulary: rows of the input embedding.
        limits: tokens that something holds, by what it is; None for no limit.

    Raises:
        ValueError: for a prompt that would end the engine's thread, or that does not fit with its answer.
    """
    if not input_ids:
        raise ValueError("The prompt has no tokens. Give at least one, such as the tokenizer's bos token.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    outside = [token for token in input_ids if not 0 <= token < vocabulary]
    if outside:
        raise ValueError(f"{outside[0]} is not a token id of this model: they are 0 to {vocabulary - 1}.")
    needed = len(input_ids) + (max_new_tokens or 1)
    for what, limit in limits.items():
        if limit is not None and needed > limit:
            raise ValueError(
                f"{len(input_ids)} prompt tokens and {max_new_tokens or 'some'} new ones do not fit into {what} of {limit} "
                "tokens. Shorten the prompt or lower max_new_tokens."
            )
    if max_new_tokens is not None:
        return max_new_tokens
    return min((limit - len(input_ids) for limit in limits.values() if limit is not None), default=2**31 - 1)


def capacity(cache: Any) -> int | None:
    """Tokens of one request that an engine's cache holds; None where all attention slides over a window."""
    allocators = cache.cache_allocators
    sizes = [a.tokens_per_page * a.num_blocks for name, a in allocators.items() if name != SLIDING_ATTENTION]
    return min(sizes, default=None)
