"""What requests ask for, as users say it, and the plans that come of it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.runtime.arguments import Unset, as_number
from finesteer_hf.runtime.plan import Plan, Selection, as_selection
from finesteer_hf.serving.admission import check_plan


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime


# What is active somewhere: adapters, and processors of the user's own.
Active = tuple[Selection, tuple[SteeringProcessor, ...]]


def plan_of(runtime: SteeringRuntime, steering: Any, scale: Any, began_in: Active | None = None) -> Plan:
    """What one request steers with, checked.

    Args:
        runtime: the model's run time.
        steering: a name, a list of names, a dict of name to scale, or None; a plan as it is; not given: what is active.
        scale: multiplies the scales.
        began_in: what is active where no block is, in place of what is set on the model.
    """
    factor = as_number(scale, "steering_scale")
    if isinstance(steering, Plan):
        plan = steering
    else:
        processors: tuple[SteeringProcessor, ...] = ()
        if not isinstance(steering, Unset):
            selection = as_selection(steering)
        elif began_in is not None and runtime.blocks.innermost() is None:
            selection, processors = began_in
        else:
            runtime.blocks.warn_of_others(runtime.selection)
            selection, processors = runtime.active()
        runtime.follow_modules()
        plan = runtime.plan(selection, processors, factor)
    check_plan(plan, runtime.tower)
    return plan


def each(count: int, steering: Any, scale: Any) -> list[tuple[Any, Any]]:
    """Steering and scale of each of several requests, from one for all or a list of one for each.

    A list of names is a list of one for each: a stack for all is given as a dict.
    """
    steerings = list(steering) if isinstance(steering, (list, tuple)) else [steering] * count
    scale = scale.tolist() if hasattr(scale, "tolist") else scale
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
    for name, values in (("steering", steerings), ("steering_scale", scales)):
        if len(values) != count:
            raise ValueError(
                f"`{name}` has {len(values)} entries for {count} prompts. Give one for each, or one for all."
            )
    return list(zip(steerings, scales, strict=True))


class AskedOfBatch:
    """What a `generate_batch` asks for, for the `add_requests` that transformers calls in it.

    Args:
        plans: one for each prompt.

    Attributes:
        error: why the requests were not taken; transformers logs it and goes on.
    """

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.error: Exception | None = None

    def __enter__(self) -> AskedOfBatch:
        self._token = OF_BATCH.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        OF_BATCH.reset(self._token)


OF_BATCH: ContextVar[AskedOfBatch | None] = ContextVar("finesteer_hf_batch", default=None)
