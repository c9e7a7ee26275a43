"""Trainings side by side: each in a process of its own, one repetition after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.cases import Case
from benchmarks.worker import Failed, Worker

MICROBATCHES = (8, 4, 2, 1)  # that are tried


def in_turns(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Trainings that take turns at their repetitions, so that all of them see the machine's moods."""
    workers = []
    try:
        for case in cases:
            workers.append(Worker(case))
        for worker in workers:
            worker.ready()
        # Up to the end of the warm-up, the repetitions, and what there is to tell after them.
        turns = [[worker.turn() for worker in workers] for _ in range(1 + cases[0].repetitions + 1)]
        return [
            _described(case, [turn["seconds"] for turn in repetitions], told)
            for case, (_, *repetitions, told) in zip(cases, zip(*turns, strict=True), strict=True)
        ]
    finally:
        for worker in workers:
            worker.stop()


def one_by_one(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Trainings that need a GPU for themselves, each with the largest micro-batch that fits."""
    return [_largest_that_fits(case) for case in cases]


def _largest_that_fits(case: Case) -> dict[str, Any]:
    for size in MICROBATCHES:
        try:
            return in_turns([replace(case, microbatch=size)])[0]
        except Failed as failure:
            if "OutOfMemoryError" not in str(failure):
                raise
    raise SystemExit(f"{case.side}, {case.reference} reference: one pair does not fit into the GPU's memory")


def _described(case: Case, seconds: list[float], told: dict[str, Any]) -> dict[str, Any]:
    """A row of the results; speeds are lists, one of each repetition.

    Tokens are useful ones, operations those of matrix products that `flops` counts.
    """
    return {
        "side": case.side,
        "reference": case.reference,
        "trained": case.trained,
        "microbatch": case.microbatch,
        "pairs_per_second": [case.batch * case.steps / s for s in seconds],
        "tokens_per_second": [told["tokens"] * case.steps / s for s in seconds],
        "operations_per_second": [told["operations"] * case.steps / s for s in seconds],
        "peak_gb": told["peak_gb"],
        "reference_pairs_per_second": told["reference_pairs_per_second"],
        "losses": told["losses"],
        "gradient_norms": told["gradient_norms"],
    }
