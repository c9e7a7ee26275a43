"""How the rows of a step are shared out over processes and cut into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bfpo_exp.config.training import Train
from bfpo_exp.distributed import group
from bfpo_exp.logprobs.paths import Lengths, LogpsPath, passes


def parts(
    batch: Iterable[int], lengths: Sequence[Lengths], path: LogpsPath, train: Train
) -> Iterator[np.ndarray]:
    """This process's rows of a batch, in as many micro-batches as every other process has; int64 each.

    ``lengths[row]`` are the tokens of a row's prompt and of its responses.  By length: processes have rows
    of all lengths, micro-batches rows of one, to waste little padding.
    """
    by_length = sorted(batch, key=lambda row: lengths[row][0] + max(lengths[row][1:]))
    shares = [by_length[rank :: group().size] for rank in range(group().size)]
    budget = train.tokens_per_microbatch or math.inf
    cuts = [passes([lengths[i] for i in s], path, train.microbatch, budget) for s in shares]
    for start, end in _halved(cuts[group().rank], max(map(len, cuts))):
        yield np.array(shares[group().rank][start:end])


def _halved(cuts: list[tuple[int, int]], number: int) -> list[tuple[int, int]]:
    """So many parts of the same whole: those of most items in halves, until there are enough."""
    cuts = list(cuts)
    while len(cuts) < number:
        fullest = max(range(len(cuts)), key=lambda k: cuts[k][1] - cuts[k][0])
        start, end = cuts[fullest]
        middle = (start + end) // 2
        cuts[fullest : fullest + 1] = [(start, middle), (middle, end)]
    return cuts
