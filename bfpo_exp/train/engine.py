"""What steps the weights.

The loop knows an engine by a few members only, three of which are DeepSpeed's: ``module``,
``backward`` and ``step``.  Here is the plain one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bfpo_exp.config.training import Optimisation
from bfpo_exp.distributed import group, sum_
from bfpo_exp.train.masters import MasterWeights
from bfpo_exp.train.optimisers import make_optimiser

TENSORS, NUMBERS = "engine.safetensors", "engine.json"


class Engine(Protocol):
    """Steps the weights of a module.

    ``any_world_size`` says whether a checkpoint can be loaded by another number of processes than
    wrote it.
    """

    module: nn.Module
    device: torch.device
    any_world_size: bool

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a scalar, already divided by the step's global count.

        ``last`` says that it is the last one before `step`.
        """

    def step(self) -> Tensor:
        """Clip, update, clear the gradients; returns their norm before clipping, shape ()."""

    def save(self, folder: Path) -> None:
        """Write everything that continuing needs; all processes call it together."""

    def load(self, folder: Path) -> None:
        """Continue from what `save` has written."""

    def weights(self) -> dict[str, Tensor] | None:
        """All weights, whole and on the CPU, in the main process; None in the others."""

    def close(self) -> None:
        """Give back what the engine holds; it is of no more use then."""


def lr_factor(step: int, steps: int, optimisation: Optimisation) -> float:
    """The share of the peak rate at a step, counted from 0: linear warm-up, then the schedule."""
    warmup = round(optimisation.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[optimisation.schedule]


def scheduled(
    optimiser: torch.optim.Optimizer, optimisation: Optimisation, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The stage's schedule on an optimiser."""
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: lr_factor(step, steps, optimisation))


class PlainEngine:
    """PyTorch's own optimisers on the trained parameters, which every process has whole."""

    any_world_size = True

    def __init__(
        self, module: nn.Module, trained: list[nn.Parameter], optimisation: Optimisation, steps: int
    ) -> None:
        self.module = module
        self.device = trained[0].device
        self.clip = optimisation.clip
        self.trained = {
            name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        self.masters = MasterWeights(list(self.trained.values()))
        self.optimiser = make_optimiser(self.masters.parameters, optimisation)
        self.schedule = scheduled(self.optimiser, optimisation, steps)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of a scalar."""
        loss.backward()

    def step(self) -> Tensor:
        """Sum over the processes, clip, update, clear; returns the norm before clipping, shape ()."""
        if group().size > 1:
            for parameter in self.masters.parameters:
                assert parameter.grad is not None
                sum_(parameter.grad)
        limit = math.inf if self.clip is None else self.clip
        norm = nn.utils.clip_grad_norm_(self.masters.parameters, limit)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.masters.write_back()
        return norm

    def save(self, folder: Path) -> None:
        """The trained weights, the optimiser, the schedule and the random state."""
        if not group().main:
            return
        optimiser = self.optimiser.state_dict()
        tensors = {f"weight/{name}": parameter.detach() for name, parameter in self.trained.items()}
        tensors |= {f"master/{name}": tensor for name, tensor in self.masters.state_tensors().items()}
        numbers: dict[str, Any] = {"groups": optimiser["param_groups"], "optimiser": {}}
        for index, state in optimiser["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser/{index}/{name}"] = value
                else:
                    numbers["optimiser"].setdefault(str(index), {})[name] = value
        tensors["random"] = torch.get_rng_state()
        numbers["schedule"] = self.schedule.state_dict()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        (folder / NUMBERS).write_text(json.dumps(numbers))

    def load(self, folder: Path) -> None:
        """Continue from what `save` has written."""
        tensors = load_file(folder / TENSORS)
        numbers = json.loads((folder / NUMBERS).read_text())
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"weight/{name}"])
        self.masters.load_state_tensors(
            {name.removeprefix("master/"): t for name, t in tensors.items() if name.startswith("master/")}
        )
        state: dict[int, dict[str, Any]] = {
            int(index): dict(values) for index, values in numbers["optimiser"].items()
        }
        for name, tensor in tensors.items():
            if name.startswith("optimiser/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({"state": state, "param_groups": numbers["groups"]})
        self.schedule.load_state_dict(numbers["schedule"])
        torch.set_rng_state(tensors["random"])

    def weights(self) -> dict[str, Tensor] | None:
        """All weights, whole and on the CPU."""
        return {n: t.cpu() for n, t in self.module.state_dict().items()} if group().main else None

    def close(self) -> None:
        """Nothing is held that Python would not free."""
