"""The closed form that a setting's policy should converge to."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bfpo_exp.bandit.settings import BanditSettings, Point
from bfpo_exp.losses import LabelOrderWarning
from bfpo_exp.theory.pairwise import (
    bfpo_label_matrix,
    ipo_label_matrix,
    pairwise_optimum,
    preference_matrix,
)


def optimum(settings: BanditSettings, point: Point) -> Tensor | None:
    """log pi of the loss's minimum over all pairs, in nats: float64 of shape (n,).

    IPO and BFPO are (h - g / tau)^2 with g = 1/2 and g = `bfpo_label`, so the minimum is known
    (`pairwise_optimum`).  DPO has none: its loss falls for ever as the margins grow, so None.
    """
    rank = torch.tensor(settings.helpfulness).argsort().double()
    preference = preference_matrix(-rank)
    if point.alpha is not None and point.b1 is not None:
        safe = torch.tensor(settings.safe, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LabelOrderWarning)  # what such an alpha does is the question here
            labels = bfpo_label_matrix(preference, safe, b1=point.b1, alpha=point.alpha)
    elif point.method == "ipo":
        labels = ipo_label_matrix(preference)
    else:
        return None
    return pairwise_optimum(labels, point.tau)
