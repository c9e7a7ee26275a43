"""The processes that do a run together, one a GPU (or CPU), as torchrun and DeepSpeed start them.

A run that is started bare is one process, and everything here does nothing.  With several, each has
the whole data and takes its share of every batch; what they sum or gather is exact, since the
shares do not overlap.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(hours=12)  # the others wait while one process tokenises, or another run trains


@dataclass(frozen=True)
class Group:
    """Which process this is, and of how many.

    Attributes:
        rank: number of this process, from 0; process 0 alone writes files and talks to MLflow.
        size: number of processes.
        local_rank: number of this process on its machine, which is that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share: every ``size``-th item."""
        return items[self.rank :: self.size]


_alone = False
_joined = False
_asked_to_stop = False
_stepping = False


def group() -> Group:
    """The group that the launcher has set up in the environment."""
    given = os.environ
    if _alone:
        return Group()
    return Group(int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1)), int(given.get("LOCAL_RANK", 0)))


@contextmanager
def alone() -> Iterator[None]:
    """What is done in here this process does by itself, while the others wait."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def join(alone_too: bool = False) -> None:
    """Meet the other processes; to be called before the first of the functions below.

    With ``alone_too`` a single process forms a group as well, which DeepSpeed wants.
    """
    global _joined
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(group().local_rank)
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if group().size > 1:
        dist.init_process_group(backend, timeout=PATIENCE)
        _joined = True
    elif alone_too:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed reads them itself
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
        _joined = True


def leave() -> None:
    """Part from the other processes, so that none waits for this one at its end."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def ending() -> Iterator[None]:
    """A whole command, which ends in `SystemExit`; one that was in a group ends without Python's own end.

    DeepSpeed keeps its groups for good, and with them gloo's threads.  One of these that is late to free
    the tensors of the last collective asks for an interpreter that is gone, and aborts the process.
    """
    try:
        yield
    except SystemExit as end:
        if not _joined or not isinstance(end.code, int | None):
            raise
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)


def ask_to_stop() -> None:
    """Stop this process: after the step that it takes, or at once where it takes none.

    For handlers of signals.  Raises `KeyboardInterrupt` in the second case.
    """
    global _asked_to_stop
    _asked_to_stop = True
    if not _stepping:
        raise KeyboardInterrupt


@contextmanager
def stepping() -> Iterator[None]:
    """In here a process that is asked to stop goes on until it sees so with `asked_to_stop`."""
    global _asked_to_stop, _stepping
    _asked_to_stop, _stepping = False, True
    try:
        yield
    finally:
        _stepping = False
    if _asked_to_stop:  # after the last look
        raise KeyboardInterrupt


def asked_to_stop() -> bool:
    """Whether one of the processes was asked; all of them look after the same step."""
    if group().size == 1:
        return _asked_to_stop
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return bool(sum_(torch.tensor(float(_asked_to_stop), device=device)))


def wait() -> None:
    """Until all processes are here."""
    if group().size > 1:
        import torch.distributed as dist

        dist.barrier()


def lost_another(error: Exception) -> bool:
    """Whether an error is what a process gets when another one, or its machine, is gone.

    NCCL's errors have a class of their own; gloo's name its source files.
    """
    import torch.distributed as dist

    return group().size > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))


def told(value: T) -> T:
    """The main process's value, in every process."""
    if group().size == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if group().size > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def gathered(part: list[Any]) -> list[Any]:
    """The items of all processes, one process after another, in every process."""
    if group().size == 1:
        return part
    import torch.distributed as dist

    parts: list[Any] = [None] * group().size
    dist.all_gather_object(parts, part)
    return [item for items in parts for item in items]
