"""The language-model head on chosen tokens alone, a few at a time.

Logits are the largest tensor of a training step: tokens times vocabulary.  Here they exist for a chunk
of tokens at once, forward and backward, and only where a log-prob is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = {"cpu": 2**21, "cuda": 2**26}  # logits that exist at once: 8 MB and 256 MB in float32


@contextmanager
def head_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward function of a model's head, until the end.

    The head is called by the model as ever, so that hooks of an engine (ZeRO 3 gathers its weight) hold.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def head_left_out(model: nn.Module) -> AbstractContextManager[None]:
    """The model gives its last hidden states in place of logits, until the end."""
    return head_replaced(model, lambda hidden: hidden)


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(weight @ hidden)[target], float32 (tokens,), in nats.

    ``hidden`` (tokens, width) and ``weight`` (vocabulary, width) are in the model's type, ``targets``
    int64 (tokens,).  Logits are products in that type; from there on everything is float32.
    """
    rows = max(1, CHUNK[hidden.device.type] // len(weight))
    return _TokenLogps.apply(hidden, weight, targets, rows, torch.is_grad_enabled())


class _TokenLogps(torch.autograd.Function):
    """With p = softmax(W h): d log p[y] / dh = W[y] - p W, and d log p[y] / dW = (1[y] - p) h^T.

    Where the head is frozen, W[y] - p W is found while the logits are there, and the backward pass
    scales it; else p is computed once more, as W's gradient needs p and the coming gradient together.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, differentiated: bool
    ) -> Tensor:
        """As `token_logps`, ``rows`` tokens at a time."""
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        ahead = differentiated and of_hidden and not of_weight
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if ahead else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            every = F.log_softmax(F.linear(hidden[part], weight), -1, dtype=torch.float32)
            logps[part] = every.gather(1, targets[part, None])[:, 0]
            if slopes is not None:
                expected = every.exp_().to(weight.dtype) @ weight
                torch.sub(weight[targets[part]], expected, out=slopes[part])
        ctx.save_for_backward(hidden if slopes is None else slopes, weight, targets)
        ctx.rows = rows
        return logps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of ``hidden`` and, where it is trained, of ``weight``."""
        saved, weight, targets = ctx.saved_tensors
        g = gradients[0][:, None]  # float32 (tokens, 1)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        if not of_weight:
            return (g * saved).to(saved.dtype), None, None, None, None
        d_hidden = torch.empty_like(saved) if of_hidden else None
        d_weight = torch.zeros_like(weight)
        for start in range(0, len(saved), ctx.rows):
            part = slice(start, start + ctx.rows)
            slopes = F.softmax(F.linear(saved[part], weight), -1, dtype=torch.float32)
            slopes.mul_(-g[part]).scatter_add_(1, targets[part, None], g[part])
            slopes = slopes.to(weight.dtype)
            d_weight.addmm_(slopes.T, saved[part])
            if d_hidden is not None:
                torch.mm(slopes, weight, out=d_hidden[part])
        return d_hidden, d_weight, None, None, None
