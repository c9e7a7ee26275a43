"""The training loop: micro-batches into gradients, gradients into steps, sums into metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bfpo_exp.config.training import Optimisation
from bfpo_exp.distributed import asked_to_stop, stepping, sum_
from bfpo_exp.train.engine import Engine

if TYPE_CHECKING:
    from bfpo_exp.train.checkpoints import Checkpoints

Batch = TypeVar("Batch")


@dataclass
class Sums:
    """Running sums, left on the device until they are read.

    ``means`` holds (sum, count) by name, ``totals`` plain sums.  Being sums, they do not depend on
    how a step was cut into micro-batches, or shared out over processes.
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
        """The values over all processes; a mean over nothing is left out.

        Every process has the same names, and gets the same values.
        """
        names = [*self.totals, *self.means]
        parts = [*self.totals.values(), *(value for pair in self.means.values() for value in pair)]
        if not parts:
            return {}
        numbers = sum_(torch.stack([part.double() for part in parts])).tolist()
        values = dict(zip(names, numbers[: len(self.totals)], strict=False))
        pairs = numbers[len(self.totals) :]
        for name, total, count in zip(self.means, pairs[::2], pairs[1::2], strict=True):
            if count > 0:
                values[name] = total / count
        return values

    def state(self) -> dict[str, Any]:
        """The sums of this process as JSON, exactly."""
        return {
            "means": {name: [_as_json(part) for part in pair] for name, pair in self.means.items()},
            "totals": {name: _as_json(total) for name, total in self.totals.items()},
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> Sums:
        """What `state` has written."""
        return cls(
            means={
                name: (_from_json(total, device), _from_json(count, device))
                for name, (total, count) in state.get("means", {}).items()
            },
            totals={name: _from_json(total, device) for name, total in state.get("totals", {}).items()},
        )


def _as_json(tensor: Tensor) -> list[Any]:
    return [tensor.item(), str(tensor.dtype).removeprefix("torch.")]


def _from_json(value: list[Any], device: torch.device) -> Tensor:
    return torch.tensor(value[0], dtype=getattr(torch, value[1]), device=device)


class Objective(Protocol[Batch]):
    """What a stage minimises."""

    rows: int

    def microbatches(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of a step: a function of the step (and the seed) alone."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sums]:
        """The micro-batch's share of the step's loss (it sums over them), and its statistics."""

    def state(self) -> dict[str, Any]:
        """What continuing needs beyond weights and step, as JSON: nothing, as a rule."""
        return {}

    def continue_from(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` has given to a checkpoint."""
        return


def total_steps(optimisation: Optimisation, rows: int) -> int:
    """How many optimisation steps a stage takes on so many rows."""
    if optimisation.steps is not None:
        return optimisation.steps
    assert optimisation.epochs is not None
    return math.ceil(optimisation.epochs * rows / optimisation.batch)


def _with_last(items: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each item, and whether it is the last."""
    previous = next(items)
    for item in items:
        yield previous, False
        previous = item
    yield previous, True


@stepping()
def train(
    engine: Engine,
    objective: Objective,
    steps: int,
    log_every: int,
    on_log: Callable[[int, Mapping[str, float]], None],
    progress: Callable[[int], None] = lambda steps: None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Take ``steps`` optimisation steps, from the latest checkpoint on if there is one.

    ``on_log`` gets the number of steps taken and the means since it was last called: after the
    first step, after every ``log_every`` and after the last.  Nothing is read from the device in
    between by a process that trains alone.

    A process that is asked to stop writes a checkpoint after the step that it takes, and raises
    `KeyboardInterrupt`.
    """
    done, state = checkpoints.resume(engine) if checkpoints else (0, {})
    if "objective" in state:
        objective.continue_from(state["objective"])
    window = Sums.of_state(state.get("window", {}), engine.device)
    progress(done)
    for step in range(done, steps):
        for batch, last in _with_last(objective.microbatches(step)):
            loss, sums = objective.loss(engine.module, batch)
            engine.backward(loss, last)
            window.add(sums)
        norm = engine.step()
        window.add(Sums(means={"gradient_norm": (norm, norm.new_ones(()))}))
        progress(1)
        taken = step + 1
        if taken == 1 or taken % log_every == 0 or taken == steps:
            on_log(taken, window.read())
            window = Sums()
        stop = asked_to_stop()
        if checkpoints and (checkpoints.due(taken, steps) or (stop and checkpoints.every is not None)):
            checkpoints.save(engine, taken, {"window": window.state(), "objective": objective.state()})
        if stop:
            raise KeyboardInterrupt
