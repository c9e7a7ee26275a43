"""Worker processes that do jobs: started once, kept warm, each on its share of the machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo_exp.distributed import ending
from bfpo_exp.sweep.manifest import Manifest

if TYPE_CHECKING:
    from bfpo_exp.config.schema import Config
    from bfpo_exp.run import Outcome

GRACE = 10.0  # seconds that an interrupted worker has to record its run
TICK = 0.5  # seconds between two looks at what no worker tells of itself
_SPAWN = multiprocessing.get_context("spawn")  # forked threads and CUDA do not survive


@dataclass(frozen=True)
class Share:
    """A worker's part of the machine: its cores, and the GPU that it sees; None: all that there are."""

    cores: frozenset[int] | None = None
    gpu: str | None = None

    def take(self) -> None:
        """Hold this process to its share; to be called before anything touches CUDA."""
        if self.cores is not None:
            os.sched_setaffinity(0, self.cores)
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu


def shares(n_jobs: int | None, configs: Iterable[Config]) -> list[Share]:
    """The machine in equal shares for ``n_jobs`` workers, or for as many as it has room for.

    That is one a GPU, or one for every ``threads`` of the cores.  Cores are held apart only where
    every stage finds as many as it has threads: a stage that others wait for may have more of them
    than a run.
    """
    threads, widest, jobs = 1, 1, 0
    for config in configs:
        jobs += 1
        threads = max(threads, config.threads)
        widest = max(widest, config.threads, config.train.base.threads, config.train.sft.threads)
    cores = sorted(os.sched_getaffinity(0))
    gpus = _gpus()
    workers = max(1, min(n_jobs or gpus or len(cores) // threads, jobs))
    each = len(cores) // workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    return [
        Share(
            cores=frozenset(cores[i * each : (i + 1) * each]) if widest <= each else None,
            gpu=visible.split(",")[i % gpus] if gpus else None,
        )
        for i in range(workers)
    ]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@dataclass
class _Worker:
    """A process on its share, and the job that it does."""

    folder: Path
    share: Share
    number: int | None = None
    process: multiprocessing.process.BaseProcess = field(init=False)
    pipe: connection.Connection = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, self.folder, self.share))
        self.process.start()
        theirs.close()

    def give(self, number: int) -> None:
        self.number = number
        with contextlib.suppress(OSError):  # it has died: `ended` tells
            self.pipe.send(number)

    def answer(self) -> tuple[bool, Outcome | None]:
        """(whether it is alive, the outcome of its job); without an outcome, another process does the run."""
        try:
            return True, self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return False, None


def do_all(
    manifest: Manifest, numbers: Sequence[int], places: Sequence[Share], retries: int, fail_fast: bool
) -> Generator[tuple[int, Outcome]]:
    """Do jobs of a sweep, each in a worker; yields (number, outcome) as they end.

    A job that fails, or whose process dies, is tried again ``retries`` times, from its checkpoint on;
    with ``fail_fast`` none is begun after one that failed for good.  A job whose run another process
    does is put off behind the others.  Raises `KeyboardInterrupt` when the sweep is cancelled.
    """
    from bfpo_exp.sweep.job import BUSY_SECONDS, died

    waiting = deque(numbers)
    not_before: dict[int, float] = {}
    tries: Counter[int] = Counter()
    workers: list[_Worker] = []
    whole = False
    try:
        workers += [_Worker(manifest.folder, place) for place in places]
        while True:
            for worker in workers:
                if worker.number is None and (number := _next(waiting, not_before)) is not None:
                    worker.give(number)
            if not waiting and all(worker.number is None for worker in workers):
                whole = True
                return
            if manifest.cancelled:
                raise KeyboardInterrupt
            spoken = connection.wait([worker.pipe for worker in workers], TICK)
            for worker in [worker for worker in workers if worker.pipe in spoken]:
                number, worker.number = worker.number, None
                alive, outcome = worker.answer()
                if not alive:
                    reason = death(worker.process.exitcode)
                    worker.start()
                    if number is None:
                        continue
                    outcome = died(manifest, number, reason)
                assert number is not None
                if outcome is None:
                    waiting.append(number)
                    not_before[number] = time.monotonic() + BUSY_SECONDS
                    continue
                tries[number] += 1
                if outcome.status == "failed" and tries[number] <= retries:
                    waiting.appendleft(number)
                    continue
                if outcome.status == "failed" and fail_fast:
                    waiting.clear()
                yield number, outcome
    finally:
        _end(workers, interrupted=not whole)


def _next(waiting: deque[int], not_before: Mapping[int, float]) -> int | None:
    """Take the first job that may be tried now."""
    now = time.monotonic()
    for number in waiting:
        if not_before.get(number, 0.0) <= now:
            waiting.remove(number)
            return number
    return None


def death(exitcode: int | None) -> str:
    """What a process died of."""
    if exitcode is not None and exitcode < 0:
        hint = " (out of memory?)" if -exitcode == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-exitcode).name}{hint}"
    return f"its process ended with exit code {exitcode}"


def _end(workers: Sequence[_Worker], interrupted: bool) -> None:
    """End the processes: idle ones as their pipe closes, interrupted ones after they have recorded it."""
    for worker in workers:
        worker.pipe.close()
        if interrupted and worker.process.is_alive():
            worker.process.terminate()
    deadline = time.monotonic() + GRACE
    try:
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:  # a second interruption does not wait
        for worker in workers:
            worker.process.kill()


def _serve(pipe: connection.Connection, folder: Path, share: Share) -> None:
    """A worker process."""
    with ending():
        _work(pipe, folder, share)
        sys.exit()


def _work(pipe: connection.Connection, folder: Path, share: Share) -> None:
    """Do the jobs whose numbers come through the pipe, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent decides
    share.take()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from filelock import Timeout

    from bfpo_exp.sweep.job import do, set_up, sigterm_interrupts

    set_up()
    with contextlib.suppress(EOFError, KeyboardInterrupt), sigterm_interrupts():
        while True:
            number = pipe.recv()
            try:
                outcome = do(Manifest.load(folder), number, wait=False)
            except Timeout:
                outcome = None
            pipe.send(outcome)


def _end_with_parent() -> None:
    """Interrupt this process when its parent is gone, and kill it if it does not end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)
