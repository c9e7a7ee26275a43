"""How the cost of our step grows with the batch, the length of the pairs, and the vocabulary."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.step import USUAL
from benchmarks.turns import in_turns
from benchmarks.workload import PROFILES, SMALL, write_model, write_rows
from bfpo_exp.progress import progress


@dataclass(frozen=True)
class Point:
    """Pairs a step, all lengths times a factor, entries of the vocabulary."""

    batch: int = 8
    length: float = 1.0
    vocabulary: int = 8000


BASE = Point()
AXES: dict[str, list[Point]] = {
    "batch": [replace(BASE, batch=n) for n in (2, 8, 32)],
    "length": [replace(BASE, length=factor) for factor in (0.25, 1.0, 2.0)],
    "vocabulary": [replace(BASE, vocabulary=n) for n in (8000, 32000, 128000)],
}
QUICK = {"batch": [replace(BASE, batch=n, length=0.1) for n in (1, 2)]}
STEPS, REPETITIONS = 1, 2


def measure(axes: dict[str, list[Point]], threads: int) -> dict[str, Any]:
    """Each axis's points with seconds of a step, tokens, and peak memory; a point is measured once."""
    every = list(dict.fromkeys(point for points in axes.values() for point in points))
    found = {}
    with progress("scaling", len(every)) as advance:
        for point in every:
            found[point] = measured(point, threads)
            advance(1)
    return {
        "profile": USUAL,
        "trained": "mlp.down_proj",
        "axes": {
            axis: [{"at": getattr(point, axis), **found[point]} for point in points]
            for axis, points in axes.items()
        },
    }


def measured(point: Point, threads: int) -> dict[str, float]:
    """Seconds and useful tokens of a step, the faster of two repetitions; peak memory in GB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", replace(SMALL, fields={**SMALL.fields, "vocab_size": point.vocabulary}))
        rows = folder / "rows.jsonl"
        write_rows(rows, PROFILES[USUAL].scaled(point.length), point.batch * STEPS, point.vocabulary)
        case = Case(
            side="ours",
            reference="cached",
            trained="mlp.down_proj",
            model=str(folder / "model"),
            dtype=SMALL.dtype,
            rows=str(rows),
            batch=point.batch,
            microbatch=point.batch,
            warmup=1,
            steps=STEPS,
            repetitions=REPETITIONS,
            threads=threads,
        )
        (row,) = in_turns([case])
    return {
        "seconds": point.batch / max(row["pairs_per_second"]),
        "tokens_per_second": max(row["tokens_per_second"]),
        "peak_gb": row["peak_gb"],
    }
