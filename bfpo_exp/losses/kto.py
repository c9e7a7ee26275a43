"""Kahneman-Tversky Optimization on the two responses of a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from bfpo_exp.losses.margin import Beta, NonNegative, log_probs
from bfpo_exp.losses.registry import register


def mean_log_ratio(
    *, policy_w: Tensor, policy_l: Tensor, ref_w: Tensor | None, ref_l: Tensor | None
) -> Tensor:
    """Per pair the mean of both responses' log-ratios to the reference: (batch,), no gradient."""
    policy_w, policy_l, ref_w, ref_l = log_probs(
        policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l
    )
    return ((policy_w - ref_w) + (policy_l - ref_l)).detach() / 2


@register("kto", step_means={"kl": mean_log_ratio})
def kto_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    kl: Tensor | None = None,
    beta: Beta,
    desirable: NonNegative = 1.0,
    undesirable: NonNegative = 1.0,
) -> Tensor:
    """KTO (Ethayarajh et al., arXiv 2402.01306, eq. 8), y_w as desirable and y_l as undesirable.

        loss = lambda_D [1 - sigmoid(beta (r_w - z))] + lambda_U [1 - sigmoid(beta (z - r_l))]
        r = log pi(y) - log ref(y),    z = max(0, ``kl``)

    ``kl`` estimates KL(pi || ref), shape (), without gradient: the mean of `mean_log_ratio` over
    all pairs of the step, or, where None, over this batch.  The paper estimates it on mismatched
    prompts and responses; here the pairs' own responses are used, as in TRL's former ``kto_pair``.

    At policy == reference every pair's loss is (lambda_D + lambda_U) / 2:

    >>> zero = torch.zeros(2)
    >>> kto_loss(policy_w=zero, policy_l=zero, ref_w=zero, ref_l=zero, beta=0.1).tolist()
    [1.0, 1.0]
    """
    if kl is None:
        kl = mean_log_ratio(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l).mean()
    z = kl.clamp(min=0)
    policy_w, policy_l, ref_w, ref_l = log_probs(
        policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l
    )
    missed_w = torch.sigmoid(-beta * ((policy_w - ref_w) - z))
    missed_l = torch.sigmoid(-beta * (z - (policy_l - ref_l)))
    return desirable * missed_w + undesirable * missed_l
