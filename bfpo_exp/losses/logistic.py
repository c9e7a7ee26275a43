"""Losses of one preference: DPO, its answers to noisy labels, the hinge, and SimPO."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bfpo_exp.losses.margin import Beta, NonNegative, Smoothing, log_probs, log_ratio_margin
from bfpo_exp.losses.registry import register


@register("cdpo")
@register("dpo")
def dpo_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    beta: Beta,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """Direct Preference Optimization (Rafailov et al., arXiv 2305.18290, eq. 7).

        loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)

    With ``label_smoothing`` e > 0 it is conservative DPO (Mitchell, "A note on DPO with noisy
    preferences", 2023), for labels that are wrong with probability e.  At policy == reference every
    pair's loss is ln 2:

    >>> import torch
    >>> zero = torch.zeros(1)
    >>> dpo_loss(policy_w=zero, policy_l=zero, ref_w=zero, ref_l=zero, beta=0.1).item()
    0.6931471824645996
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    loss = -(1 - label_smoothing) * F.logsigmoid(beta * h)
    return loss - label_smoothing * F.logsigmoid(-beta * h) if label_smoothing else loss


@register("robust_dpo")
def robust_dpo_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    beta: Beta,
    label_smoothing: Smoothing,
) -> Tensor:
    """Provably robust DPO (Chowdhury et al., arXiv 2403.00409).

        loss = [-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1 - 2 e)

    Its expectation over labels that flip with probability e is DPO's loss on the clean label, so
    it may be negative.
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    kept, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@register("hinge")
def hinge_loss(
    *, policy_w: Tensor, policy_l: Tensor, ref_w: Tensor | None, ref_l: Tensor | None, beta: Beta
) -> Tensor:
    """The hinge on the log-ratio margin (RSO's "hinge-norm", Liu et al., arXiv 2309.06657).

        loss = max(0, 1 - beta h)

    Without a reference it is the calibration loss of SLiC-HF (arXiv 2305.10425) in units of beta,
    whose margin delta is 1 / beta; SLiC's regularisation towards demonstrations is not part of it.
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    return F.relu(1 - beta * h)


@register("simpo")
def simpo_loss(*, policy_w: Tensor, policy_l: Tensor, beta: Beta, gamma: NonNegative) -> Tensor:
    """Simple Preference Optimization (Meng et al., arXiv 2405.14734, eq. 6): no reference.

        loss = -log sigmoid(beta (log pi(y_w) - log pi(y_l)) - gamma)

    The paper's log-probs are means over the response's tokens (``loss.logps=mean``).

    >>> import torch
    >>> round(simpo_loss(policy_w=torch.tensor([-1.0]), policy_l=torch.tensor([-1.5]),
    ...                  beta=2.0, gamma=1.0).item(), 6)  # the margin is just met
    0.693147
    """
    policy_w, policy_l = log_probs(policy_w=policy_w, policy_l=policy_l)
    return -F.logsigmoid(beta * (policy_w - policy_l) - gamma)
