"""The `with model.steering(...)` blocks of a model: which one a thread is in, and its steering."""

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
    """A `with model.steering(...)` block: its steering replaces the model's selection.

    Attributes:
        owner: `id` of its `OpenBlocks`.
        selection, processors: its steering.
        outer: the block around it.
        thread: identity of the thread that entered it.
        session: the call of this model in which it was entered, if any.
        closed: whether it was left but could not be removed: out of order, or from another context, such as by a
            generator that another thread closes. It is then skipped.
        warned: whether a call of another thread was warned about it.
        token: context variable token that removes it.
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
    """The open blocks of one model, in all threads.

    Attributes:
        blocks: the blocks in the order in which they were entered.
    """

    def __init__(self) -> None:
        self.blocks: list[BlockSteering] = []
        self._lock = threading.RLock()

    def innermost(self) -> BlockSteering | None:
        """The innermost block of this thread."""
        block = BLOCK.get()
        while block is not None and (block.closed or block.owner != id(self)):
            block = block.outer
        return block

    def enter(
        self, selection: Selection, processors: tuple[SteeringProcessor, ...], session: CallSession | None
    ) -> BlockSteering:
        """Open a block in this thread.

        Args:
            selection, processors: its steering.
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
        """Warn, once per block, if this thread is in no block and another thread's block has other steering.

        A new thread does not inherit the blocks of the thread that starts it, and cannot know which thread that was.

        Args:
            selection: the selection set on the model.
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
                f"This thread is in no `with model.steering(...)` block and steers with what is set on the model "
                f"({dict(selection) or 'nothing'}), while a block of another thread steers with "
                f"{', '.join(map(str, says))}. A thread does not inherit the block that it was started in: give "
                "`steering=` to the call, use `model.set_steering(...)`, or start the thread with "
                "`contextvars.copy_context().run`.",
                BlockElsewhereWarning,
                stacklevel=4,
            )

    def renew_after_fork(self) -> None:
        """Drop the blocks of threads that a child process does not have."""
        self._lock = threading.RLock()
        self.blocks = [block for block in self.blocks if block.thread == threading.get_ident()]


def _taken_away(block: BlockSteering) -> bool:
    """Remove a block if it is this context's innermost; contexts copied inside it keep it."""
    if BLOCK.get() is not block or block.token is None:
        return False
    try:
        BLOCK.reset(block.token)
    except ValueError:
        # A copy of the context in which it was entered keeps it.
        return False
    return True
