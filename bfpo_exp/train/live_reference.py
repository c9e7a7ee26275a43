"""References that are computed as they are needed, without a second model.

Policy and reference differ in the trained weights alone.  So the policy's module computes the reference's
log-probs as well: with the first values of the trained weights in their place, or with its adapters off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bfpo_exp.config.schema import Deepspeed, Train
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.paths import LogpsPath, Rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def check_reference(train: Train, deepspeed: Deepspeed) -> None:
    """A `UserError` for a live reference of weights of which a process holds parts only (ZeRO 3)."""
    stage = (deepspeed.config or {}).get("zero_optimization", {}).get("stage", 0)
    if train.reference == "live" and train.lora is None and stage == 3:
        raise UserError(
            f"train.reference=live needs whole weights in every process, which deepspeed={deepspeed.name} "
            "does not keep; use train.reference=cached, adapters (train=lora), or deepspeed=none|zero1|zero2"
        )


class Reference(Protocol):
    """A reference that computes log-probs when it is asked."""

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
        self._logps = _Logps(model, path)
        self._first = {f"model.{name}": parameters[name].detach().clone() for name in trained}

    @torch.no_grad()
    def logps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """As `Reference.logps`."""
        return functional_call(self._logps, self._first, (rows,))


class _Logps(nn.Module):
    """A model's log-probs as a module, whose weights can be replaced for a call."""

    def __init__(self, model: nn.Module, path: LogpsPath) -> None:
        super().__init__()
        self.model, self.path = model, path

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Sums and counts, as the path gives them."""
        return self.path.logps(self.model, rows)


class AdapterOff:
    """The model without its adapters, of which there is nothing to copy."""

    def __init__(self, model: PeftModel, path: LogpsPath) -> None:
        self._model, self._path = model, path

    @torch.no_grad()
    def logps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """As `Reference.logps`."""
        with self._model.disable_adapter():
            return self._path.logps(self._model, rows)


def live_reference(model: nn.Module, path: LogpsPath) -> Reference:
    """The reference of a model whose weights to be trained are chosen, or that has its adapters."""
    if hasattr(model, "disable_adapter"):
        return AdapterOff(model, path)  # type: ignore[arg-type]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return LiveReference(model, trained, path)  # type: ignore[arg-type]
