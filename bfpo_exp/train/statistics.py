"""What a preference run measures of its pairs, whatever its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bfpo_exp.losses import LossSpec, log_ratio_margin
from bfpo_exp.train.loop import Sums

SAFETY = {"safe": lambda s: s >= 0.5, "unsafe": lambda s: s < 0.5}  # both false for NaN


def pair_statistics(
    spec: LossSpec, hyperparameters: Mapping[str, Any], tensors: Mapping[str, Tensor], losses: Tensor
) -> Sums:
    """The sums behind the ``train/`` metrics (docs/metrics.md) of n pairs.

    ``tensors`` has policy_w, policy_l, ref_w, ref_l in nats and safe_w, safe_l, NaN where there is no
    label; ``losses`` are the pairs' losses; all of shape (n,).
    """
    h = log_ratio_margin(**{name: tensors[name] for name in ("policy_w", "policy_l", "ref_w", "ref_l")})
    wanted = spec.wanted_sign(tensors, hyperparameters)
    ratios = torch.cat([tensors["policy_w"] - tensors["ref_w"], tensors["policy_l"] - tensors["ref_l"]])
    rewards = hyperparameters.get("beta", 1.0) * ratios
    safe = torch.cat([tensors["safe_w"], tensors["safe_l"]])
    own = spec.monitored(tensors, hyperparameters)
    return Sums(
        means={
            "loss": _mean(losses),
            "margin": _mean(h),
            "accuracy": _mean((h * wanted > 0).float(), wanted != 0),
            "kl": _mean(-ratios),
            "reward_safe": _mean(rewards, SAFETY["safe"](safe)),
            "reward_unsafe": _mean(rewards, SAFETY["unsafe"](safe)),
            **{name: _mean(values) for name, values in own.items()},
        },
        totals={
            f"cell_{a}_{b}": (in_a(tensors["safe_w"]) & in_b(tensors["safe_l"])).sum()
            for a, in_a in SAFETY.items()
            for b, in_b in SAFETY.items()
        },
    )


def _mean(values: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum and the count of the values where ``of`` holds, of all without it."""
    of = torch.ones_like(values, dtype=torch.bool) if of is None else of
    return values[of].sum(), of.sum()
