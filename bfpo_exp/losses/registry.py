"""What the pipeline knows of a loss: read off its function's signature, nowhere else.

A loss is a pure function of keyword arguments.  Arguments named in `TENSORS` are filled in per
batch; what stands beside them are its hyper-parameters, whose types and ranges are their
annotations.  So a loss that takes ``safe_w`` needs safety labels, one that takes ``ref_w`` needs
a reference, and a new loss is one function and one YAML file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, create_model
from torch import Tensor

from bfpo_exp.errors import unknown

TENSORS = ("policy_w", "policy_l", "ref_w", "ref_l", "safe_w", "safe_l")


@dataclass(frozen=True)
class LossSpec:
    """A registered loss.

    ``function`` gives per-example losses, float32 of shape (batch,).  ``direction`` gives per
    pair the sign that the loss wants the log-ratio margin h to have (+1, -1, or 0 for neither);
    without it every pair's wanted sign is +1.
    """

    name: str
    function: Callable[..., Tensor]
    direction: Callable[..., Tensor] | None

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The tensor arguments that the function takes."""
        return tuple(p for p in inspect.signature(self.function).parameters if p in TENSORS)

    @property
    def needs_safety(self) -> bool:
        """Whether the loss reads the two safety labels."""
        return "safe_w" in self.tensors

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return "ref_w" in self.tensors

    @property
    def needs(self) -> list[str]:
        """What the loss must be given beside the policy's log-probs, in words."""
        wants = {"reference": self.needs_reference, "safety labels": self.needs_safety}
        return [name for name, wanted in wants.items() if wanted]

    @cached_property
    def hyperparameters(self) -> type[BaseModel]:
        """The schema of the remaining arguments, for checking a config."""
        hints = get_type_hints(self.function, include_extras=True)
        fields: dict[str, Any] = {
            name: (hints[name], ...)
            for name in inspect.signature(self.function).parameters
            if name not in TENSORS
        }
        return create_model(f"{self.name}_loss", __config__=ConfigDict(extra="forbid", frozen=True), **fields)

    def __call__(self, tensors: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]) -> Tensor:
        """Per-example losses of a batch; ``tensors`` may hold more than the loss takes."""
        return self.function(**{name: tensors[name] for name in self.tensors}, **hyperparameters)

    def wanted_sign(self, tensors: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]) -> Tensor:
        """Per pair, the sign of h that the loss asks for: float32 of shape (batch,)."""
        if self.direction is None:
            return torch.ones_like(tensors["policy_w"])
        names = inspect.signature(self.direction).parameters
        known = {**tensors, **hyperparameters}
        return self.direction(**{name: known[name] for name in names})


LOSSES: dict[str, LossSpec] = {}


def register(
    name: str, direction: Callable[..., Tensor] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a loss known under the name that its YAML file gives."""

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LOSSES[name] = LossSpec(name, function, direction)
        return function

    return add


def get_loss(name: str) -> LossSpec:
    """The loss of this name; a `UserError` with the nearest name where there is none."""
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    return LOSSES[name]
