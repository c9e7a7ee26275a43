"""Float32 master weights: what an optimiser steps in place of trained weights of fewer bits.

A bfloat16 weight has 8 significant bits: an update of less than 1/512 of it is rounded away, and at a
learning rate of 5e-7 AdamW has no other for weights above 3e-4.  So the optimiser steps float32 copies,
and the model gets them rounded (mixed precision as in Micikevicius et al., 2018, arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class MasterWeights:
    """Float32 copies of the trained parameters that have fewer bits; float32 ones stand for themselves.

    The gradient of every backward pass is added to its copy's in float32 as soon as it is complete, and
    the parameter's own is freed: sums over micro-batches lose no bits, and there are never more than a
    few gradients in the parameters' own type.

    Attributes:
        parameters: what the optimiser steps, whose gradients are clipped and cleared, in the order of
            the trained parameters.
    """

    def __init__(self, trained: Sequence[nn.Parameter]) -> None:
        self.parameters: list[nn.Parameter] = []
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for i, parameter in enumerate(trained):
            if parameter.dtype not in (torch.bfloat16, torch.float16):
                self.parameters.append(parameter)
                continue
            master = nn.Parameter(parameter.detach().float())
            parameter.register_post_accumulate_grad_hook(_moved_to(master))
            self.parameters.append(master)
            self._pairs[str(i)] = parameter, master

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model the copies' values, rounded to its own type; after every optimiser step."""
        for parameter, master in self._pairs.values():
            parameter.copy_(master)

    def state_tensors(self) -> dict[str, Tensor]:
        """The copies by the number of their parameter, for a checkpoint; float32 parameters have none."""
        return {name: master.detach() for name, (_, master) in self._pairs.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state_tensors` gave; the model's weights follow.

        Raises `ValueError` for the tensors of other parameters.
        """
        own = {name: master.shape for name, (_, master) in self._pairs.items()}
        given = {name: tensor.shape for name, tensor in tensors.items()}
        if given != own:
            raise ValueError(f"master weights of shapes {given} were saved, those trained now have {own}")
        for name, (_, master) in self._pairs.items():
            master.copy_(tensors[name])
        self.write_back()


def _moved_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to its master's and frees it."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return move
