"""The plain path: every sequence is a padded row of its own.

It is the reference implementation that any faster path is held against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfpo_exp.logprobs.head import head_left_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = Sequence[int]


@dataclass(frozen=True)
class PaddedRows:
    """Prompts with their responses, padded on the right.

    Attributes:
        input_ids: int64 of shape (rows, length).
        attention_mask: int64 of the same shape; 0 marks padding.
        response_mask: bool of shape (rows, length - 1); true where position t + 1 is a response token,
            so that it lines up with the logits that predict it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @property
    def targets(self) -> Tensor:
        """The response tokens, response after response, int64 (R,)."""
        return self.input_ids[:, 1:][self.response_mask]

    @classmethod
    def of(
        cls, prompts: Sequence[Tokens], responses: Sequence[Tokens], device: torch.device | str = "cpu"
    ) -> PaddedRows:
        """Rows of token ids; what stands in the padding never matters."""
        lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        starts = torch.tensor([len(p) for p in prompts])
        rows = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        position = torch.arange(input_ids.shape[1])
        inside = position < lengths[:, None]
        response = inside & (position >= starts[:, None])
        return cls(input_ids.to(device), inside.long().to(device), response[:, 1:].to(device))


def states(model: nn.Module, rows: PaddedRows) -> Tensor:
    """What the head is shown to predict each response token, (R, width), in the order of ``targets``."""
    with head_left_out(model):
        found = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    return found[:, :-1][rows.response_mask]


def token_logps(model: PreTrainedModel, rows: PaddedRows) -> Tensor:
    """Log-probs of the response tokens, 0 elsewhere: float32 of shape (rows, length - 1), in nats."""
    logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    targets = rows.input_ids[:, 1:]
    # Only response positions go through the float32 softmax: prompts and padding would double the work.
    chosen = -F.cross_entropy(
        logits[:, :-1][rows.response_mask].float(), targets[rows.response_mask], reduction="none"
    )
    return torch.zeros(targets.shape, device=chosen.device).masked_scatter(rows.response_mask, chosen)


def response_logps(model: PreTrainedModel, rows: PaddedRows) -> tuple[Tensor, Tensor]:
    """Summed log-prob (float32, nats) and token count (int64) of each response, both of shape (rows,)."""
    return token_logps(model, rows).sum(-1), rows.response_mask.sum(-1)
