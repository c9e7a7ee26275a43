"""References that are computed as they are needed, without a second model.

Policy and reference differ in the trained weights alone.  So the policy's module computes the reference's
log-probs as well: with the first values of the trained weights in their place, or with its adapters off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bfpo_exp.logprobs.paths import LogpsPath, Rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

T = TypeVar("T")


class Reference(Protocol):
    """A reference that computes when it is asked."""

    def applied(self, function: Callable[[nn.Module], T]) -> T:
        """What a function of a model gives of the reference, without gradients."""

    def logps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Summed log-probs (float32, nats) and token counts (int64) of responses, both (rows,), without
        gradients.
        """


class LiveReference:
    """The model with the values that its trained weights have now, whatever becomes of them.

    Only these are copied, in their own type; all other weights are the policy's own.  It is to be made
    before the first step, and in a run that continues before the checkpoint is loaded.
    """

    def __init__(self, model: PreTrainedModel, trained: Sequence[str], path: LogpsPath) -> None:
        parameters = dict(model.named_parameters())
        self._applied, self._path = _Applied(model), path
        self._first = {f"model.{name}": parameters[name].detach().clone() for name in trained}

    @torch.no_grad()
    def applied(self, function: Callable[[nn.Module], T]) -> T:
        """As `Reference.applied`."""
        return functional_call(self._applied, self._first, (function,))

    def logps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """As `Reference.logps`."""
        return self.applied(lambda model: self._path.logps(model, rows))


class _Applied(nn.Module):
    """A function of a model as a module, in which the model's weights can be replaced for a call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], T]) -> T:
        """What the function gives."""
        return function(self.model)


class AdapterOff:
    """The model without its adapters, of which there is nothing to copy."""

    def __init__(self, model: PeftModel, path: LogpsPath) -> None:
        self._model, self._path = model, path

    @torch.no_grad()
    def applied(self, function: Callable[[nn.Module], T]) -> T:
        """As `Reference.applied`."""
        with self._model.disable_adapter():
            return function(self._model)

    def logps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """As `Reference.logps`."""
        return self.applied(lambda model: self._path.logps(model, rows))


def live_reference(model: nn.Module, path: LogpsPath) -> Reference:
    """The reference of a model whose weights to be trained are chosen, or that has its adapters."""
    if hasattr(model, "disable_adapter"):
        return AdapterOff(model, path)  # type: ignore[arg-type]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return LiveReference(model, trained, path)  # type: ignore[arg-type]
