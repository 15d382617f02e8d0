"""Several processes of one fit, started by `accelerate launch` or `torchrun`: each reads its share of the texts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch


Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """This process's index, and the number of processes.

    Attributes:
        index: 0 is the main one.
        count: 1 for an ordinary run.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls, cpu: bool) -> Processes:
        """The processes of this run; joins their group if a launcher started several.

        Args:
            cpu: whether the model is on the CPU; a group that is already joined stays as it is.

        Raises:
            RuntimeError: if several processes were launched but accelerate's state has only one.
        """
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not launched and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=cpu)
        if launched and state.num_processes == 1:
            # Accelerate keeps the first state that is made; without `cpu=True` and without a GPU it joins no group.
            raise RuntimeError(
                f"{os.environ['WORLD_SIZE']} processes were launched, but the script had created accelerate's state "
                "for a single process, so each would read all texts. On the CPU create it with "
                "`PartialState(cpu=True)` or `Accelerator(cpu=True)`, or not at all."
            )
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's items: every `count`-th one."""
        return items[self.index :: self.count]

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, in process order, on every process."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        gathered: list[Item] = gather_object(items)
        return gathered

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in the main process, then in the others; none continues before all are done."""
        if not self.is_main:
            self.wait()
        try:
            yield
        finally:
            if self.is_main:
                self.wait()
            self.wait()


ALONE = Processes()
