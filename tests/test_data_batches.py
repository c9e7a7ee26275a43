"""Batches as a function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bfpo_exp.data import batches
from bfpo_exp.data.batches import BatchOrder
from bfpo_exp.errors import UserError

SIZES = st.integers(1, 40)


def streams_of(helpfulness: int, safety: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation([0] * helpfulness + [1] * safety).astype(np.int8)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 50), st.integers(0, 2**31 - 1))
def test_an_epoch_has_each_row_once(helpfulness: int, safety: int, batch: int, seed: int) -> None:
    rows = helpfulness + safety
    order = BatchOrder(seed, streams_of(helpfulness, safety), batch, "shuffle")
    drawn = np.concatenate([order[step] for step in range(-(-3 * rows // batch))])
    for epoch in range(3):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 25), st.integers(0, 2**31 - 1))
def test_balanced_batches_run_through_each_stream_on_its_own(
    helpfulness: int, safety: int, half: int, seed: int
) -> None:
    streams = streams_of(helpfulness, safety)
    order = BatchOrder(seed, streams, 2 * half, "balanced")
    drawn = np.stack([order[step] for step in range(-(-2 * max(helpfulness, safety) // half))])
    for stream, size in ((0, helpfulness), (1, safety)):
        part = drawn[:, stream * half : (stream + 1) * half].ravel()
        assert (streams[part] == stream).all()
        for epoch in range(len(part) // size):
            assert sorted(part[epoch * size : (epoch + 1) * size]) == list(np.flatnonzero(streams == stream))


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, st.integers(1, 10), st.sampled_from(["shuffle", "balanced"]))
def test_a_step_depends_on_no_other(helpfulness: int, safety: int, half: int, mode: batches.Mode) -> None:
    streams = streams_of(helpfulness, safety)
    batches.permutation.cache_clear()
    straight = BatchOrder(5, streams, 2 * half, mode)[57]
    batches.permutation.cache_clear()
    order = BatchOrder(5, streams, 2 * half, mode)
    for step in range(57):
        order[step]
    assert (order[57] == straight).all()
    assert straight.dtype == np.int64
    assert straight.shape == (2 * half,)


def test_seeds_and_epochs_shuffle_differently() -> None:
    streams = streams_of(50, 50)
    order = BatchOrder(0, streams, 100, "shuffle")
    assert not (order[0] == order[1]).all()
    assert not (order[0] == BatchOrder(1, streams, 100, "shuffle")[0]).all()
    assert (order[0] == BatchOrder(0, streams, 100, "shuffle")[0]).all()


def test_a_step_makes_no_permutation_twice() -> None:
    order = BatchOrder(0, streams_of(1000, 500), 8, "balanced")
    batches.permutation.cache_clear()
    for step in range(100):
        order[step]
    assert batches.permutation.cache_info().misses == 2


def test_batches_that_cannot_be_made() -> None:
    with pytest.raises(UserError, match=r"train\.batch=7 is odd, .*use 8, or data\.batches=shuffle"):
        BatchOrder(0, streams_of(4, 4), 7, "balanced")
    with pytest.raises(UserError, match="the stream 'safety' has no pairs"):
        BatchOrder(0, streams_of(4, 0), 2, "balanced")
    with pytest.raises(UserError, match="there are no pairs"):
        BatchOrder(0, streams_of(0, 0), 2, "shuffle")
