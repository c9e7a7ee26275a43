"""BFPO's label for several binary factors beside the ordering by helpfulness.

A response has factors s_1 .. s_m (harmless, lawful, private, ...), each 1 where it holds.  They
enter through one score of the response, so that the reward and its proof are BFPO's with S for s:

    S(y) = sum_k c_k s_k(y),    c_k >= 0,    sum_k c_k = 1

docs/theory.md derives the guarantees, and says why the score is linear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bfpo_exp.errors import UserError
from bfpo_exp.losses.label import B1, bfpo_label
from bfpo_exp.losses.margin import Finite, safety_labels

_SUM_TOLERANCE = 1e-6


def lexicographic_weights(count: int) -> tuple[float, ...]:
    """Weights under which a factor counts more than all later ones together.

        c_k = 2^(m - k) / (2^m - 1),    k = 1 .. m

    S then takes 2^m values, evenly spaced by 1 / (2^m - 1): the factor vectors in lexicographic order.
    No other weights with that order keep the closest two values further apart.

    >>> lexicographic_weights(1), [round(c, 4) for c in lexicographic_weights(3)]
    ((1.0,), [0.5714, 0.2857, 0.1429])
    """
    if count < 1:
        raise UserError(f"{count} factors given; allowed: 1 or more")
    return tuple(2 ** (count - k) / (2**count - 1) for k in range(1, count + 1))


def factors_score(factors: Tensor, weights: Sequence[float]) -> Tensor:
    """The score S in [0, 1] of responses, from their factors.

    Args:
        factors: (..., m), labels in {0, 1} or probabilities; bool and low precisions become float32.
        weights: m numbers >= 0 that sum to 1; `lexicographic_weights` for an order of priority.

    Returns:
        (...), float32, or float64 for float64 factors.  At probabilities it is the expected score,
        whatever the dependence between factors, because the score is linear.

    Raises:
        UserError: for weights that are not as above, or factors outside [0, 1].

    >>> factors_score(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), weights=(0.75, 0.25)).tolist()
    [0.75, 0.25]
    """
    if factors.ndim == 0 or factors.shape[-1] != len(weights):
        raise UserError(
            f"factors have shape {tuple(factors.shape)}; allowed with {len(weights)} weights: "
            f"(..., {len(weights)})"
        )
    if not (all(0 <= c <= 1 for c in weights) and math.isclose(sum(weights), 1, abs_tol=_SUM_TOLERANCE)):
        raise UserError(f"weights {tuple(weights)} are not allowed: they are >= 0 and sum to 1")
    names = [f"factor {k}" for k in range(1, len(weights) + 1)]
    labels = torch.stack(safety_labels(**dict(zip(names, factors.unbind(-1), strict=True))), dim=-1)
    score = (labels * torch.tensor(weights, dtype=labels.dtype, device=labels.device)).sum(-1)
    return score.clamp(max=1.0)  # weights that are rounded may sum to a little more than 1


def factors_label(
    *, factors_w: Tensor, factors_l: Tensor, weights: Sequence[float], b1: B1, alpha: Finite
) -> Tensor:
    """The label g of a pair ordered by helpfulness, from the m factors of either response.

        g = b3 (b1 S_w - S_l) - alpha,    b3 = 1 / (b1 - 1),    S = sum_k c_k s_k

    With m = 1 it is `bfpo_label`.  Two responses of equal S get S - alpha, so ``alpha`` is a
    threshold: the more helpful is preferred where S lies above it, the less helpful below.

    Args:
        factors_w: (batch, m), factors of the more helpful response, in {0, 1} or probabilities.
        factors_l: (batch, m), of the less helpful one.
        weights: the c_k, m numbers >= 0 that sum to 1, the same for every pair.
        b1: weight of the more helpful response's score, > 1.
        alpha: threshold that is subtracted from the label.

    Returns:
        (batch,), at least float32.

    Raises:
        UserError: as `factors_score` and `bfpo_label` do.

    Factors (harmless, lawful), harmlessness first; the pairs differ in the first, in the second, in none:

    >>> factors_w = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    >>> factors_l = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    >>> label = factors_label(
    ...     factors_w=factors_w, factors_l=factors_l, weights=(0.75, 0.25), b1=3.0, alpha=0.5
    ... )
    >>> label.tolist()
    [0.5, 0.625, 0.25]
    """
    return bfpo_label(
        safe_w=factors_score(factors_w, weights), safe_l=factors_score(factors_l, weights), b1=b1, alpha=alpha
    )
