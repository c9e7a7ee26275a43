"""Losses that pull the margin towards a target: (h - target)^2."""

from __future__ import annotations

from torch import Tensor

from bfpo_exp.losses.label import B1, bfpo_label
from bfpo_exp.losses.margin import Beta, Finite, log_ratio_margin
from bfpo_exp.losses.registry import register


@register("ipo")
def ipo_loss(
    *, policy_w: Tensor, policy_l: Tensor, ref_w: Tensor | None, ref_l: Tensor | None, beta: Beta
) -> Tensor:
    """Identity Preference Optimization (Azar et al., arXiv 2310.12036, eq. 17).

        loss = (h - 1 / (2 beta))^2

    Whether the log-probs are sums (the paper's code) or means over tokens (today's libraries) is
    the setting ``loss.logps``; beta has another scale in each.

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> ipo_loss(policy_w=zero, policy_l=zero, ref_w=zero, ref_l=zero, beta=0.1).item()
    25.0
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    return (h - 1 / (2 * beta)) ** 2


@register("bfpo", label=bfpo_label, orders=("helpfulness",))
def bfpo_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    safe_w: Tensor,
    safe_l: Tensor,
    beta: Beta,
    b1: B1 = 3.0,
    alpha: Finite = 0.5,
) -> Tensor:
    """Bi-Factorial Preference Optimization (arXiv 2408.15313, eq. 15): the pair is by helpfulness.

        loss = (h - g / beta)^2,    g = `bfpo_label`

    At policy == reference a pair's loss is (g / beta)^2:

    >>> import torch
    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> bfpo_loss(policy_w=zero, policy_l=zero, ref_w=zero, ref_l=zero, safe_w=one, safe_l=zero,
    ...           beta=0.5, b1=3.0, alpha=0.5).item()
    4.0
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    return (h - bfpo_label(safe_w=safe_w, safe_l=safe_l, b1=b1, alpha=alpha) / beta) ** 2
