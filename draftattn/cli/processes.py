"""The processes of one command, one for each GPU, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from draftattn.errors import InputError

if TYPE_CHECKING:
    from draftattn.eval.study import Run

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is.

    Args:
        index: number of this process, over all machines.
        count: how many there are.
        device: where this one computes.

    Raises:
        InputError: if there is no such process.

    >>> Processes(1, 3, torch.device("cpu")).share(["a", "b", "c", "d", "e"])
    ['b', 'e']
    """

    index: int
    count: int
    device: torch.device

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"process {self.index} of {self.count}; they are numbered from 0")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return self.index == 0

    def wait(self) -> None:
        """Waits until every process has come this far, for days if need be."""
        if self.count > 1:
            torch.distributed.barrier(group=_patient_group())

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Lets the main process do something alone, then the others the same, who find it done."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()
        self.wait()

    def makes(self, run: Run, num_prompts: int) -> bool:
        """Whether a run of a study falls to this process: a dense video and those compared with it stay together."""
        return (run.seed * num_prompts + run.prompt) % self.count == self.index

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items that fall to this process; all are given out, and none twice."""
        return list(items[self.index :: self.count])


def join_processes(device: torch.device) -> Processes:
    """Joins the processes that a launcher started; without one there is this process alone.

    Args:
        device: where to compute if there is no launcher; its type otherwise, on the GPU of this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, device)
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    _patient_group()  # made by all processes together
    atexit.register(_leave)
    return Processes(state.process_index, state.num_processes, state.device)


@functools.cache
def _patient_group() -> Any:
    # that of the GPUs gives up after some minutes, and one process's videos may take hours more than another's
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
