"""How fast a stage trains, and what memory it takes."""

from __future__ import annotations

import contextlib
import resource
import time
from pathlib import Path
from typing import Protocol

import torch


class Measured(Protocol):
    """What the meter asks of an objective."""

    @property
    def pairs_per_step(self) -> float:
        """Responses of a step over all processes, counted in pairs."""

    def tokens(self, step: int) -> int:
        """Tokens of a step that was taken: of prompts, once each, and of their responses."""


class Meter:
    """Speed since the last reading, and the peak of memory since the start."""

    def __init__(self, objective: Measured) -> None:
        self.objective = objective
        self.taken = 0
        self.last = time.perf_counter()
        _reset_peak_memory()

    def read(self, taken: int) -> dict[str, float]:
        """Pairs and tokens a second over the steps since the last reading; peak memory in GB (1e9)."""
        seconds = time.perf_counter() - self.last
        steps = range(self.taken, taken)
        values = {
            "perf/pairs_per_second": len(steps) * self.objective.pairs_per_step / seconds,
            "perf/tokens_per_second": sum(self.objective.tokens(step) for step in steps) / seconds,
            "perf/peak_memory_gb": _peak_memory_bytes() / 1e9,
        }
        self.taken, self.last = taken, time.perf_counter()
        return values


def _reset_peak_memory() -> None:
    """Forget the peak of what this process did before, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_bytes() -> float:
    """Peak memory of the device that trains: the GPU's allocations, or the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * float(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
