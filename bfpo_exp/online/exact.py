"""The KL divergence of next-token distributions, exactly, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bfpo_exp.logprobs.head import CHUNK


def exact_kl(hidden: Tensor, weight: Tensor, of_reference: Tensor, reference_weight: Tensor) -> Tensor:
    """KL(pi(. | s_t) || ref(. | s_t)) in nats of each token t, float32 (R,).

    ``hidden`` and ``of_reference`` (R, width) are the last hidden states of policy and reference, the
    weights (vocabulary, width) those of their heads.  No tensor of tokens times vocabulary is kept:
    backward, logits are computed again.
    """
    rows = max(1, CHUNK[hidden.device.type] // len(weight))
    again: Callable[..., Any] = checkpoint
    parts = [
        again(
            _kl, hidden[start : start + rows], weight, of_reference[start : start + rows], reference_weight,
            use_reentrant=False,
        )
        for start in range(0, len(hidden), rows)
    ]  # fmt: skip
    return torch.cat(parts)


def _kl(hidden: Tensor, weight: Tensor, of_reference: Tensor, reference_weight: Tensor) -> Tensor:
    policy = (hidden @ weight.T).log_softmax(-1, dtype=torch.float32)
    reference = (of_reference @ reference_weight.T).log_softmax(-1, dtype=torch.float32)
    return (policy.exp() * (policy - reference)).sum(-1)
