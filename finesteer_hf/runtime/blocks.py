"""The `with model.steering(...)` blocks of a model: which one a thread stands in, and what it steers with."""

from __future__ import annotations

import threading
import warnings
from contextvars import ContextVar, Token
from dataclasses import dataclass

from finesteer_hf.errors import BlockElsewhereWarning
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.runtime.plan import Selection
from finesteer_hf.runtime.session import CallSession


@dataclass(eq=False)
class BlockSteering:
    """What a `with model.steering(...)` block puts in place of what is set on the model.

    Attributes:
        owner: `id` of the `OpenBlocks` that it is one of.
        selection, processors: what it steers with.
        outer: the block around it.
        thread: identity of the thread that entered it.
        session: the call of this model in which it was entered, if any.
        closed: whether it was left where it could not be taken away: out of turn, or from another context, as a
            generator that is closed by another thread does. It is passed over then.
        warned: whether a call of another thread was told about it.
        token: takes it away again.
    """

    owner: int
    selection: Selection
    processors: tuple[SteeringProcessor, ...]
    outer: BlockSteering | None
    thread: int
    session: CallSession | None = None
    closed: bool = False
    warned: bool = False
    token: Token[BlockSteering | None] | None = None


BLOCK: ContextVar[BlockSteering | None] = ContextVar("finesteer_hf_block", default=None)


class OpenBlocks:
    """The blocks of one model that are open, in all threads.

    Attributes:
        blocks: in the order in which they were entered.
    """

    def __init__(self) -> None:
        self.blocks: list[BlockSteering] = []
        self._lock = threading.RLock()

    def innermost(self) -> BlockSteering | None:
        """The block that this thread stands in."""
        block = BLOCK.get()
        while block is not None and (block.closed or block.owner != id(self)):
            block = block.outer
        return block

    def enter(
        self, selection: Selection, processors: tuple[SteeringProcessor, ...], session: CallSession | None
    ) -> BlockSteering:
        """Open a block in this thread.

        Args:
            selection, processors: what it steers with.
            session: the call in which it is entered, if any.
        """
        block = BlockSteering(id(self), selection, processors, BLOCK.get(), threading.get_ident(), session)
        if session is not None:
            session.blocks += 1
        block.token = BLOCK.set(block)
        with self._lock:
            self.blocks.append(block)
        return block

    def leave(self, block: BlockSteering) -> None:
        """Close a block; in any order, and from any thread."""
        if block.session is not None:
            block.session.blocks -= 1
        with self._lock:
            self.blocks.remove(block)
        block.closed = not _taken_away(block)
        while (innermost := BLOCK.get()) is not None and innermost.closed:
            BLOCK.set(innermost.outer)

    def warn_of_others(self, selection: Selection) -> None:
        """Warn, once a block, if this thread stands in none and one of another thread steers with something else.

        A new thread does not inherit the blocks of the thread that starts it, nor can it be told which thread that was.

        Args:
            selection: what is set on the model.
        """
        if not self.blocks or self.innermost() is not None:
            return
        with self._lock:
            others = [
                block
                for block in self.blocks
                if block.thread != threading.get_ident()
                and not block.warned
                and (block.selection, block.processors) != (selection, ())
            ]
            for block in others:
                block.warned = True
        if others:
            says = [
                dict(block.selection) or [type(p).__name__ for p in block.processors] or "nothing" for block in others
            ]
            warnings.warn(
                f"This thread stands in no `with model.steering(...)` block and steers with what is set on the model "
                f"({dict(selection) or 'nothing'}), while a block of another thread steers with "
                f"{', '.join(map(str, says))}. A thread does not inherit the block that it was started in: give "
                "`steering=` to the call, use `model.set_steering(...)`, or start the thread with "
                "`contextvars.copy_context().run`.",
                BlockElsewhereWarning,
                stacklevel=4,
            )

    def renew_after_fork(self) -> None:
        """Forget the blocks of threads that a child process does not have."""
        self._lock = threading.RLock()
        self.blocks = [block for block in self.blocks if block.thread == threading.get_ident()]


def _taken_away(block: BlockSteering) -> bool:
    """Take a block away if it is this context's innermost; contexts that were copied inside it keep it."""
    if BLOCK.get() is not block or block.token is None:
        return False
    try:
        BLOCK.reset(block.token)
    except ValueError:
        # A copy of the context that it was entered in: there it stays.
        return False
    return True
