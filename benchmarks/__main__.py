"""``python -m benchmarks``: measure, show tables, keep the results.

The results go to docs/performance.json, of which each part writes its own section, and from there into
docs/performance.md and its plot.  Nothing else should use the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report, scaling, sheets, stages, step, sweep, tuning
from benchmarks.machine import cores, machine
from bfpo_exp.runtime import before_compute

PARTS = ("defaults", "step", "scaling")  # in the time that most have for it
MORE = ("sweep", "stages", "tuning", "memory")


def main() -> None:
    """Do the parts that are asked for, one after another."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=(*PARTS, *MORE), action="append", help="this part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="to see that it runs: the figures mean nothing")
    parser.add_argument("--gpu", action="store_true", help="the steps of a model of 7B weights on a GPU")
    parser.add_argument("--output", type=Path, help="another file for the results, and no page")
    options = parser.parse_args()
    if options.quick and options.output is None:
        options.output = Path("performance-quick.json")
    results = options.output or report.RESULTS
    before_compute(cores())
    for part in options.only or PARTS:
        if part == "memory":
            from benchmarks import memory

            sys.argv = [sys.argv[0]]
            memory.main()
            continue
        name, measure = measurement(part, options.quick, options.gpu)
        section = {"machine": machine(), **measure()}
        keep(results, name, section)
        for sheet in sheets.SHEETS[name]:
            Console().print(sheet(section).terminal())
    if options.output is None:
        report.main()
    print(f"written to {results}")


def measurement(part: str, quick: bool, gpu: bool) -> tuple[str, Callable[[], dict[str, Any]]]:
    """The section of the results that a part fills, and what measures it."""
    if part == "step" and gpu:
        return "step_gpu", lambda: step.measure(step.GPU, cores())
    return part, {
        "defaults": lambda: step.measure_defaults(step.QUICK if quick else step.FULL, cores()),
        "step": lambda: step.measure(step.QUICK if quick else step.FULL, cores()),
        "sweep": lambda: sweep.measure(sweep.QUICK if quick else sweep.FULL),
        "scaling": lambda: scaling.measure(scaling.QUICK if quick else scaling.AXES, cores()),
        "stages": lambda: stages.measure(["experiment=smoke"] if quick else []),
        "tuning": lambda: tuning.measure(cores()),
    }[part]


def keep(file: Path, name: str, section: dict[str, Any]) -> None:
    """Put a section into the results; the other ones stay."""
    found = json.loads(file.read_text()) if file.exists() else {}
    found[name] = section
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
