"""Which pairs are in a batch: a function of (seed, step) alone, so resuming needs only the step."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from bfpo_exp.config.schema import STREAMS
from bfpo_exp.errors import UserError

Mode = Literal["balanced", "shuffle"]


class BatchOrder:
    """The batches of a run: ``order[step]`` gives row numbers, int64 of shape (batch,).

    ``streams`` (rows,) holds each row's stream as an index into `STREAMS`.  Mode "shuffle" draws
    from all rows (the paper's "w/o buffer"), mode "balanced" takes batch/2 rows from each of the
    two streams, those of the first stream first (the paper's buffered training).  Rows where
    ``used``, bool (rows,), is false are in no batch.  Every pool of rows is shuffled anew for each
    epoch of its own: within an epoch each row comes once, a batch may cross into the next epoch,
    and the shorter stream starts again when it ends.

    A step costs O(batch) once its epoch's permutation has been made.  Raises `UserError` if the
    batch cannot be made.
    """

    def __init__(
        self, seed: int, streams: np.ndarray, batch: int, mode: Mode, used: np.ndarray | None = None
    ) -> None:
        self.seed, self.batch = seed, batch
        streams = np.asarray(streams)
        used = np.ones(len(streams), bool) if used is None else used
        if mode == "shuffle":
            self.pools = {len(STREAMS): np.flatnonzero(used)}
        else:
            if batch % 2:
                raise UserError(
                    f"train.batch={batch} is odd, but data.batches=balanced takes half of it from each "
                    f"stream; use {batch + 1}, or data.batches=shuffle"
                )
            self.pools = {key: np.flatnonzero(used & (streams == key)) for key in range(len(STREAMS))}
        for key, pool in self.pools.items():
            if not len(pool):
                what = f"the stream {STREAMS[key]!r} has" if key < len(STREAMS) else "there are"
                raise UserError(f"data.batches={mode}, but {what} no pairs to draw from")

    def __getitem__(self, step: int) -> np.ndarray:
        """The rows of the batch at a step, from 0."""
        share = self.batch // len(self.pools)
        places = np.arange(step * share, (step + 1) * share)
        return np.concatenate([self._drawn(key, pool, places) for key, pool in self.pools.items()])

    def _drawn(self, key: int, pool: np.ndarray, places: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(places, len(pool))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = pool[permutation(self.seed, key, int(epoch), len(pool))[offsets[here]]]
        return rows


@functools.lru_cache(maxsize=4)  # two streams, each in at most two epochs at once
def permutation(seed: int, stream: int, epoch: int, length: int) -> np.ndarray:
    """The order of a stream's rows in one of its epochs; read-only, int64 of shape (length,)."""
    order = np.random.default_rng([seed, stream, epoch]).permutation(length)
    order.flags.writeable = False
    return order
