"""The training loop: micro-batches into gradients, gradients into steps, sums into metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import Tensor, nn

from bfpo_exp.config.schema import Optimisation
from bfpo_exp.train.engine import Engine

Batch = TypeVar("Batch")


@dataclass
class Sums:
    """Running sums, left on the device until they are read.

    ``means`` holds (sum, count) by name, ``totals`` plain sums.  Being sums, they do not depend on
    how a step was cut into micro-batches.
    """

    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add another's sums to these."""
        for name, (total, count) in other.means.items():
            if name in self.means:
                before, before_count = self.means[name]
                total, count = before + total, before_count + count
            self.means[name] = (total, count)
        for name, total in other.totals.items():
            self.totals[name] = self.totals[name] + total if name in self.totals else total

    def read(self) -> dict[str, float]:
        """The values; a mean over nothing is left out."""
        values = {name: total.item() for name, total in self.totals.items()}
        for name, (total, count) in self.means.items():
            if count.item() > 0:
                values[name] = total.item() / count.item()
        return values


class Objective(Protocol[Batch]):
    """What a stage minimises."""

    rows: int

    def microbatches(self, step: int) -> Iterator[Batch]:
        """The micro-batches of a step: a function of the step (and the objective's seed) alone."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sums]:
        """The micro-batch's share of the step's loss (it sums over them), and its statistics."""


def total_steps(optimisation: Optimisation, rows: int) -> int:
    """How many optimisation steps a stage takes on so many rows."""
    if optimisation.steps is not None:
        return optimisation.steps
    assert optimisation.epochs is not None
    return math.ceil(optimisation.epochs * rows / optimisation.batch)


def train(
    engine: Engine,
    objective: Objective,
    steps: int,
    log_every: int,
    on_log: Callable[[int, Mapping[str, float]], None],
    progress: Callable[[int], None] = lambda steps: None,
) -> None:
    """Take ``steps`` optimisation steps.

    ``on_log`` gets the number of steps taken and the means since it was last called: after the
    first step, after every ``log_every`` and after the last.  Nothing is read from the device in
    between.
    """
    window = Sums()
    for step in range(steps):
        for batch in objective.microbatches(step):
            loss, sums = objective.loss(engine.module, batch)
            engine.backward(loss)
            window.add(sums)
        norm = engine.step()
        window.add(Sums(means={"gradient_norm": (norm, norm.new_ones(()))}))
        progress(1)
        taken = step + 1
        if taken == 1 or taken % log_every == 0 or taken == steps:
            on_log(taken, window.read())
            window = Sums()
