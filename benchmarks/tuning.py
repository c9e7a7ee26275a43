"""Both sides by the size of their micro-batch on a CPU: all weights trained, the reference ahead."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.step import FULL, SIDES, case_of, prepared
from benchmarks.turns import MICROBATCHES, in_turns
from bfpo_exp.progress import progress


def measure(threads: int) -> dict[str, Any]:
    """Pairs a second and peak memory in GB, by side, profile and pairs a micro-batch."""
    plan = replace(FULL, repetitions=1)
    found: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
    total = len(SIDES) * len(plan.steps) * len(MICROBATCHES)
    with tempfile.TemporaryDirectory() as name, progress("micro-batches", total) as advance:
        folder = Path(name)
        prepared(plan, folder)
        for side in SIDES:
            found[side] = {profile: {} for profile in plan.steps}
            for profile, of_profile in found[side].items():
                for size in MICROBATCHES:
                    case = case_of(plan, folder, profile, side, "all", "cached", threads)
                    (row,) = in_turns([replace(case, microbatch=size)])
                    of_profile[size] = {
                        "pairs_per_second": row["pairs_per_second"][0],
                        "peak_gb": row["peak_gb"],
                    }
                    advance(1)
    return {"microbatches": list(MICROBATCHES), "found": found}
