"""What the pipeline knows of a loss: read off its function's signature and its registration.

A loss is a pure function of keyword arguments.  Arguments named in `TENSORS` are filled in per
batch; what stands beside them are its hyper-parameters, whose types, ranges and defaults are those
of the signature.  So a loss that takes ``safe_w`` needs safety labels, one that takes ``ref_w``
a reference, one that takes ``margin_w`` a policy that was trained first; and a new loss is one
function and one YAML file.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, create_model
from torch import Tensor

from bfpo_exp.errors import unknown
from bfpo_exp.losses.staged import STAGED, StagedLoss

TENSORS = ("policy_w", "policy_l", "ref_w", "ref_l", "safe_w", "safe_l", "margin_w", "margin_l")

PerPair = Callable[..., Tensor]  # keyword arguments as a loss takes them -> one value a pair


@dataclass(frozen=True)
class LossSpec:
    """A registered loss.

    Attributes:
        function: per-example losses, at least float32 of shape (batch,).
        label: per pair a number whose sign is the one that the loss wants the margin h to have
            (0: neither); without it every pair's wanted sign is +1.
        orders: values of ``loss.order`` with which the loss means what its paper says; empty: all.
        drops_zero_labels: whether pairs with label 0 are kept out of the batches.
        monitors: quantities whose mean over pairs is logged as ``train/<name>``.
        step_means: arguments of the function that are means over all pairs of a step, however it
            is cut into micro-batches.
    """

    name: str
    function: PerPair
    label: PerPair | None = None
    orders: tuple[str, ...] = ()
    drops_zero_labels: bool = False
    monitors: Mapping[str, PerPair] = field(default_factory=dict)
    step_means: Mapping[str, PerPair] = field(default_factory=dict)

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
    def needs_margin(self) -> bool:
        """Whether the loss reads the rewards of a policy that was trained first."""
        return "margin_w" in self.tensors

    @property
    def needs(self) -> list[str]:
        """What the loss must be given beside the policy's log-probs, in words."""
        wants = {
            "reference": self.needs_reference,
            "safety labels": self.needs_safety,
            "margin of a first policy": self.needs_margin,
        }
        return [name for name, wanted in wants.items() if wanted]

    @cached_property
    def hyperparameters(self) -> type[BaseModel]:
        """The schema of the remaining arguments, for checking a config."""
        hints = get_type_hints(self.function, include_extras=True)
        fields: dict[str, Any] = {
            name: (hints[name], ... if p.default is inspect.Parameter.empty else p.default)
            for name, p in inspect.signature(self.function).parameters.items()
            if name not in TENSORS and name not in self.step_means
        }
        return create_model(f"{self.name}_loss", __config__=ConfigDict(extra="forbid", frozen=True), **fields)

    def __call__(self, tensors: Mapping[str, Tensor | None], hyperparameters: Mapping[str, Any]) -> Tensor:
        """Per-example losses of a batch; ``tensors`` may hold more than the loss takes."""
        return _called(self.function, {**tensors, **hyperparameters})

    def tried(self, hyperparameters: Mapping[str, Any]) -> list[str]:
        """What the loss warns of: it is tried on the four label cells at policy == reference."""
        cells = {"safe_w": torch.tensor([1.0, 1.0, 0.0, 0.0]), "safe_l": torch.tensor([0.0, 1.0, 0.0, 1.0])}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self({name: cells.get(name, torch.zeros(4)) for name in TENSORS}, hyperparameters)
        return [str(warning.message) for warning in caught]

    def wanted_sign(self, tensors: Mapping[str, Tensor], hyperparameters: Mapping[str, Any]) -> Tensor:
        """Per pair, the sign of h that the loss asks for: float of shape (batch,)."""
        if self.label is None:
            return torch.ones_like(next(iter(tensors.values())))
        return _called(self.label, {**tensors, **hyperparameters}).sign()

    def monitored(
        self, tensors: Mapping[str, Tensor | None], hyperparameters: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The loss's own quantities of a batch, by name: each of shape (batch,)."""
        known = {**tensors, **hyperparameters}
        return {name: _called(function, known) for name, function in self.monitors.items()}

    def for_step_means(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Per pair, what the arguments in ``step_means`` are means of: each of shape (batch,)."""
        return {name: _called(function, tensors) for name, function in self.step_means.items()}


def _called(function: PerPair, known: Mapping[str, Any]) -> Tensor:
    names = inspect.signature(function).parameters
    return function(**{name: known[name] for name in names if name in known})


LOSSES: dict[str, LossSpec] = {}


def register(name: str, **facts: Any) -> Callable[[PerPair], PerPair]:
    """Make a loss known under the name that its YAML file gives, with the facts of `LossSpec`."""

    def add(function: PerPair) -> PerPair:
        LOSSES[name] = LossSpec(name, function, **facts)
        return function

    return add


def get_loss(name: str) -> LossSpec | StagedLoss:
    """The loss of this name; a `UserError` with the nearest name where there is none."""
    if name in STAGED:
        return STAGED[name]
    if name not in LOSSES:
        raise unknown("loss", name, [*LOSSES, *STAGED])
    return LOSSES[name]


def pairwise_loss(name: str) -> LossSpec:
    """The loss of this name, where only a function of pairs can be meant."""
    spec = get_loss(name)
    assert isinstance(spec, LossSpec), f"loss {name} is trained by a stage of its own"
    return spec
