"""Whether an optimum ranks its actions as BFPO wants, and for which shifts it does."""

from __future__ import annotations

from torch import Tensor


def in_wanted_order(log_ratio: Tensor, helpfulness: Tensor, safety: Tensor) -> Tensor:
    """Whether log(pi / ref) ranks safe actions by helpfulness, then unsafe ones by its reverse.

    That is the global preference of the paper's figure 3: helpful and safe, safe, neither, helpful and
    harmful.  Unequal helpfulness must make a strict difference.

    Args:
        log_ratio: (..., n), log pi - log ref, up to a constant.
        helpfulness: (..., n), the higher the more helpful, no two alike.
        safety: (..., n), in {0, 1}.

    Returns:
        (...), bool.
    """
    safe = safety > 0.5
    signed = helpfulness.argsort(-1).argsort(-1) + 1  # ranks from 1, so that a sign can carry safety
    wanted = signed.where(safe, -signed)
    in_order = log_ratio.gather(-1, wanted.argsort(-1))
    return (in_order.diff(dim=-1) > 0).all(-1)


def shift_band(n: int) -> tuple[float, float]:
    """The open interval of alpha for which EVERY labelling of n actions gets the wanted order.

        |alpha - 1/2| < 1 / (2 (n - 1))

    for a strict ranking of n >= 2 equally likely actions and any b1 > 1 (docs/theory.md); as n grows,
    only alpha = 1/2 is left.

    >>> shift_band(5)
    (0.375, 0.625)
    """
    return 0.5 - 1 / (2 * (n - 1)), 0.5 + 1 / (2 * (n - 1))
