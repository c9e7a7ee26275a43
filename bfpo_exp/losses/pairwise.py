"""The pairwise losses: pure functions of log-probs and labels, one value per pair.

Notation of the BFPO paper (arXiv 2408.15313).  For a pair (y_w, y_l) in the order that the loss
trains on, with pi the policy and ref the frozen reference,

    h = [log pi(y_w) - log pi(y_l)] - [log ref(y_w) - log ref(y_l)]

``policy_w`` is log pi(y_w) and so on: tensors of shape (batch,) in nats.  Lower precisions are
raised to float32 first; float64 stays.  Every function returns a tensor of shape (batch,), so
that whoever averages decides over what.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bfpo_exp.losses.registry import register

Beta = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
B1 = Annotated[float, Field(gt=1, allow_inf_nan=False)]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def log_ratio_margin(*, policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> Tensor:
    """The margin h of the log-ratios, in nats; swapping the two responses negates it."""
    policy_w, policy_l, ref_w, ref_l = map(_at_least_float32, (policy_w, policy_l, ref_w, ref_l))
    return (policy_w - policy_l) - (ref_w - ref_l)


@register("dpo")
def dpo_loss(*, policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: Beta) -> Tensor:
    """Direct Preference Optimization (Rafailov et al., arXiv 2305.18290, eq. 7).

        loss = -log sigmoid(beta * h)

    At policy == reference every pair's loss is ln 2:

    >>> zero = torch.zeros(1)
    >>> dpo_loss(policy_w=zero, policy_l=zero, ref_w=zero, ref_l=zero, beta=0.1).item()
    0.6931471824645996
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    return -F.logsigmoid(beta * h)


@register("ipo")
def ipo_loss(*, policy_w: Tensor, policy_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: Beta) -> Tensor:
    """Identity Preference Optimization (Azar et al., arXiv 2310.12036, eq. 17).

        loss = (h - 1 / (2 beta))^2

    Whether the log-probs are sums (the paper's code) or means over tokens (today's libraries) is
    the setting ``loss.logps``; beta has another scale in each.

    >>> zero = torch.zeros(1)
    >>> ipo_loss(policy_w=zero, policy_l=zero, ref_w=zero, ref_l=zero, beta=0.1).item()
    25.0
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    return (h - 1 / (2 * beta)) ** 2


def bfpo_label(*, safe_w: Tensor, safe_l: Tensor, b1: B1, alpha: Finite) -> Tensor:
    """The label g of a pair ordered by helpfulness (BFPO, eq. 9, with the shift of eq. 14).

        g = b3 (b1 s_w - s_l) - alpha,    b3 = 1 / (b1 - 1)

    ``alpha`` is subtracted, as in the paper's code; the paper adds its negative.  ``safe_w`` and
    ``safe_l`` are labels in {0, 1} or probabilities of being safe, shape (batch,).

    >>> s_w, s_l = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    >>> bfpo_label(safe_w=s_w, safe_l=s_l, b1=3.0, alpha=0.5).tolist()
    [1.0, 0.5, -0.5, -1.0]
    """
    safe_w, safe_l = _at_least_float32(safe_w), _at_least_float32(safe_l)
    return (b1 * safe_w - safe_l) / (b1 - 1) - alpha


def _bfpo_direction(safe_w: Tensor, safe_l: Tensor, b1: float, alpha: float) -> Tensor:
    return bfpo_label(safe_w=safe_w, safe_l=safe_l, b1=b1, alpha=alpha).sign()


@register("bfpo", direction=_bfpo_direction)
def bfpo_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    safe_w: Tensor,
    safe_l: Tensor,
    beta: Beta,
    b1: B1,
    alpha: Finite,
) -> Tensor:
    """Bi-Factorial Preference Optimization (arXiv 2408.15313, eq. 15): the pair is by helpfulness.

        loss = (h - g / beta)^2,    g = `bfpo_label`

    At policy == reference a pair's loss is (g / beta)^2:

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> bfpo_loss(policy_w=zero, policy_l=zero, ref_w=zero, ref_l=zero, safe_w=one, safe_l=zero,
    ...           beta=0.5, b1=3.0, alpha=0.5).item()
    4.0
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    return (h - bfpo_label(safe_w=safe_w, safe_l=safe_l, b1=b1, alpha=alpha) / beta) ** 2
