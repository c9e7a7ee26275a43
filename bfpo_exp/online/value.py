"""A value head on a policy: trained with it, and left out of what is saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "value_head"


def add_value_head(model: nn.Module) -> None:
    """A linear head on the last hidden states, zero at first, in the model's type and place."""
    weight: Any = model.get_output_embeddings().weight  # type: ignore[operator]
    head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.add_module(NAME, head)


def values(model: nn.Module, hidden: Tensor) -> Tensor:
    """The expected return at each of R states, float32 (R,).

    The states are taken as they are: what the value head learns does not change the policy.
    """
    head: nn.Module = getattr(getattr(model, "module", model), NAME)
    return head(hidden.detach())[:, 0].float()


def without_value_head(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The policy's own weights, and a model that has no others."""
    if hasattr(model, NAME):
        delattr(model, NAME)
    return {name: tensor for name, tensor in weights.items() if NAME not in name.split(".")}


def no_values(hidden: Tensor) -> Tensor:
    """What stands for values where there is no head: zeros, float32 (R,)."""
    return hidden.new_zeros(len(hidden), dtype=torch.float32)
