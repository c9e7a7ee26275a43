"""Losses of helpfulness and safety other than BFPO: SafeDPO, BSO, MODPO and SACPO."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bfpo_exp.losses.margin import Beta, NonNegative, log_probs, log_ratio_margin, safety_labels
from bfpo_exp.losses.registry import register

Clamp = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(gt=0, le=1)]


def safedpo_sign(*, safe_w: Tensor, safe_l: Tensor) -> Tensor:
    """SafeDPO's transformation of a pair by helpfulness: float32 of shape (batch,).

    +1 keeps the pair (y_w is safe), -1 swaps it (only y_l is safe), 0 drops it (neither is).
    """
    return torch.where(safe_w >= 0.5, 1.0, torch.where(safe_l >= 0.5, -1.0, 0.0))


@register("safedpo", label=safedpo_sign, orders=("helpfulness",), drops_zero_labels=True)
def safedpo_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    safe_w: Tensor,
    safe_l: Tensor,
    beta: Beta,
    delta: NonNegative = 10.0,
) -> Tensor:
    """SafeDPO (Kim et al., arXiv 2505.20065, eq. 12): the pair is by helpfulness.

        loss = -log sigmoid(beta h' - (u_l' - u_w') delta),    u = 1 - s

    where a prime marks the pair after `safedpo_sign`: kept, swapped, or dropped.  A dropped pair's
    loss is 0; in training such pairs never enter a batch.  Probabilities of being safe count as
    labels, from one half on as safe.  With no unsafe label it is DPO.
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    safe_w, safe_l = (labels >= 0.5 for labels in safety_labels(safe_w=safe_w, safe_l=safe_l))
    sign = safedpo_sign(safe_w=safe_w.to(h), safe_l=safe_l.to(h)).to(h)
    offset = delta * (safe_w != safe_l).to(h)  # after the swap the safe response is the first
    return sign.abs() * -F.logsigmoid(beta * sign * h - offset)


def _bso_log_ratio(h: Tensor, safe_w: Tensor, safe_l: Tensor, beta: float, penalty: float) -> Tensor:
    """log R = -(beta h + C (u_w - u_l)), which BSO's generators are functions of."""
    return -(beta * h + penalty * (safe_l - safe_w))


def bso_clamped(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    safe_w: Tensor,
    safe_l: Tensor,
    beta: float,
    penalty: float,
    clamp: float,
) -> Tensor:
    """Per pair 1 where BSO's log-ratio lies beyond its clamp, so that no gradient flows; else 0."""
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    return (_bso_log_ratio(h, safe_w, safe_l, beta, penalty).abs() > clamp).float()


@register("bso", orders=("helpfulness",), monitors={"clamped": bso_clamped})
def bso_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    safe_w: Tensor,
    safe_l: Tensor,
    beta: Beta,
    penalty: NonNegative = 10.0,
    clamp: Clamp = 30.0,
) -> Tensor:
    """Bregman Safety Optimization with the logistic generator (Nguyen et al., arXiv 2605.12339).

        loss = -log sigmoid(beta h + C (u_w - u_l)),    u = 1 - s

    The pair is by helpfulness and C is ``penalty``; C = 0 gives DPO.  Where both responses are
    equally safe, or only y_w is, it is SafeDPO's loss at delta = C; where only y_l is safe SafeDPO
    swaps the pair, and this loss all but ignores it.  The log-ratio is clamped to +-``clamp``,
    beyond which a pair has no gradient; the share of such pairs is logged as ``train/clamped``.
    The paper's C = 30 puts every pair of which only y_w is safe at that clamp from the start.
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    safe_w, safe_l = safety_labels(safe_w=safe_w, safe_l=safe_l)
    return -F.logsigmoid(-_bso_log_ratio(h, safe_w, safe_l, beta, penalty).clamp(-clamp, clamp))


@register("modpo")
def modpo_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    margin_w: Tensor,
    margin_l: Tensor,
    beta: Beta,
    weight: Weight,
) -> Tensor:
    """Multi-Objective DPO with two objectives (Zhou et al., arXiv 2310.03708).

        loss = -log sigmoid([beta h - (1 - weight) (m_w - m_l)] / weight)

    The pair is by the objective of this ``weight``; m is the other objective's reward, float of
    shape (batch,): here that of a policy aligned with it first, m = beta_1 log(pi_1 / ref).  With
    weight 1 it is DPO.
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    margin_w, margin_l = log_probs(margin_w=margin_w, margin_l=margin_l)
    return -F.logsigmoid((beta * h - (1 - weight) * (margin_w - margin_l)) / weight)


@register("sacpo")
def sacpo_loss(
    *,
    policy_w: Tensor,
    policy_l: Tensor,
    ref_w: Tensor | None,
    ref_l: Tensor | None,
    beta: Beta,
    trade_off: Beta,
) -> Tensor:
    """The second stage of Stepwise Alignment (SACPO, Wachi et al., arXiv 2404.11049).

        loss = -log sigmoid((beta / lambda) h)

    lambda is ``trade_off``, the weight of safety against the reward.  The pair is by safety; start
    and reference are the policy that the first stage (``loss.first``) aligned with the reward.
    """
    h = log_ratio_margin(policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l)
    return -F.logsigmoid(beta / trade_off * h)
