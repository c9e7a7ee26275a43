"""Worker processes that do runs: started once, kept warm, each on its share of the machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext
from typing import Any

from bfpo_exp import progress
from bfpo_exp.config.schema import Config
from bfpo_exp.paths import home
from bfpo_exp.run import Outcome, give_up, run

MAX_DEATHS = 3  # worker deaths after which the runs that are left count as failed


def worker_count(n_jobs: int | None, configs: Sequence[Config]) -> int:
    """As many as asked for; else one a GPU, or one for every ``threads`` of the cores."""
    if n_jobs is None:
        cores = len(os.sched_getaffinity(0)) // max(config.threads for config in configs)
        n_jobs = _gpus() or cores
    return max(1, min(n_jobs, len(configs)))


def do_all(
    configs: Sequence[Config], uri: str, parent_id: str | None, workers: int
) -> Iterator[tuple[int, Outcome]]:
    """Do every run; yields (index, outcome) as they end.

    With one worker that is this process.  A worker that dies takes no other run down: the runs
    without an outcome are given to fresh workers and continue from what the store has.
    """
    if workers == 1:
        for i, config in enumerate(configs):
            yield i, _guarded(config, uri, parent_id)
        return
    left = set(range(len(configs)))
    for _ in range(MAX_DEATHS):
        try:
            for i, outcome in _in_pool({i: configs[i] for i in left}, uri, parent_id, workers):
                left.remove(i)
                yield i, outcome
            return
        except BrokenProcessPool:
            continue
    for i in left:
        reason = f"the worker processes died {MAX_DEATHS} times (killed, or out of memory?)"
        yield i, give_up(configs[i], uri, parent_id, reason)


def _in_pool(
    configs: dict[int, Config], uri: str, parent_id: str | None, workers: int
) -> Iterator[tuple[int, Outcome]]:
    context = multiprocessing.get_context("spawn")  # forked threads and CUDA do not survive
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(_numbers(context, workers), _gpus())
    ) as pool:
        futures = {pool.submit(_guarded, config, uri, parent_id): i for i, config in configs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _guarded(config: Config, uri: str, parent_id: str | None) -> Outcome:
    """`run`, whose own errors (its inputs have gone, the disk is full) fail this job alone."""
    try:
        return run(config, uri, parent_id)
    except Exception as error:
        return Outcome("failed", {}, home() / "run", 0.0, f"{type(error).__name__}: {error}")


def _numbers(context: SpawnContext, workers: int) -> Any:
    """A queue from which each worker takes its number."""
    queue = context.Queue()
    for number in range(workers):
        queue.put(number)
    return queue


def _start(numbers: Any, gpus: int) -> None:
    if gpus:  # before anything touches CUDA
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[numbers.get() % gpus]
    progress.silence()  # the sweep's own bar is the parent's


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
