"""A gate in a training loop: it times repetitions, and holds the training back between them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from benchmarks.memory import resident_bytes

if TYPE_CHECKING:
    from benchmarks.cases import Case


class Over(Exception):
    """The last repetition is over; what would follow it, such as saving, is not wanted."""


@dataclass
class Seen:
    """What a training told: of each step but the last the loss, and the gradients' norm before clipping."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    reference_pairs_per_second: float | None = None


class Gate:
    """Lets a process go on only when it is its turn: after a line from the parent, which gets one at its end.

    The first turn is everything up to the end of the warm-up, the others are repetitions.

    Attributes:
        peak: of memory over all steps, in bytes.
    """

    def __init__(self, case: Case, asked: TextIO, told: TextIO) -> None:
        self.ends = [case.warmup + case.steps * i for i in range(case.repetitions + 1)]
        self.asked, self.told = asked, told
        self.taken = 0
        self.started = 0.0
        self.peak = 0.0

    def turn(self, **ended: Any) -> None:
        """Tell that a turn has ended, and wait for the next one."""
        self.tell(ended)
        self.asked.readline()
        self.started = time.perf_counter()

    def first_step(self) -> None:
        """To be called before the first step: the peak of memory is counted from here."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        Path("/proc/self/clear_refs").write_text("5")

    def step(self, steps: int) -> None:
        """To be called after steps were taken; raises `Over` after the last repetition."""
        self.taken += steps
        if not steps or self.taken not in self.ends:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.peak = _peak_bytes()
        self.turn(seconds=time.perf_counter() - self.started)
        if self.taken == self.ends[-1]:
            raise Over

    def tell(self, what: Mapping[str, Any]) -> None:
        """A line to the parent."""
        self.told.write(json.dumps(what) + "\n")
        self.told.flush()


def _peak_bytes() -> float:
    """The peak so far: of the GPU's allocations, or of resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")
