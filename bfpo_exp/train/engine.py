"""What steps the weights.

The loop knows an engine by three members only, which are DeepSpeed's: ``module``, ``backward`` and
``step``.  Here is the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Optimisation


class Engine(Protocol):
    """Steps the weights of a module."""

    module: nn.Module

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar, already divided by the step's global count."""

    def step(self) -> Tensor:
        """Clip, update, clear the gradients; returns their norm before clipping, shape ()."""


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


class PlainEngine:
    """PyTorch's AdamW on the trained parameters of one process."""

    def __init__(
        self, module: nn.Module, trained: Iterable[nn.Parameter], optimisation: Optimisation, steps: int
    ) -> None:
        self.module = module
        self.trained = list(trained)
        self.clip = optimisation.clip
        self.optimiser = torch.optim.AdamW(
            self.trained,
            lr=optimisation.lr,
            betas=optimisation.betas,
            weight_decay=optimisation.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: lr_factor(step, steps, optimisation)
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar."""
        loss.backward()

    def step(self) -> Tensor:
        """Clip, update, clear; returns the gradients' norm before clipping, shape ()."""
        norm = nn.utils.clip_grad_norm_(self.trained, math.inf if self.clip is None else self.clip)
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm
