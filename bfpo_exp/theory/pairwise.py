"""Pairwise least squares on a finite set of actions: the policy that a squared loss ends in.

IPO and BFPO minimise, over pairs, the square of ``h(y, y') - g(y, y') / tau`` with

    h(y, y') = [log pi(y) - log pi(y')] - [log ref(y) - log ref(y')]

On n actions that is linear least squares in log pi, so its minimum is known without training.
All functions take leading batch dimensions ``...``, and keep float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bfpo_exp.errors import UserError
from bfpo_exp.losses import bfpo_label

_ROUNDING = 1e-6  # of the largest label: what float32 leaves of an exact identity


def preference_matrix(helpfulness: Tensor) -> Tensor:
    """P(y > y') of a ranking: 1 where y is the more helpful, 0 where it is the less, 1/2 at ties.

    Args:
        helpfulness: (..., n), any real scores; the higher, the more helpful.

    Returns:
        (..., n, n), rows y, columns y'; the diagonal is 1/2.

    >>> preference_matrix(torch.tensor([2.0, 1.0])).tolist()
    [[0.5, 1.0], [0.0, 0.5]]
    """
    difference = helpfulness[..., :, None] - helpfulness[..., None, :]
    return (difference.sign() + 1) / 2


def ipo_label_matrix(preference: Tensor) -> Tensor:
    """IPO's label of every ordered pair: the mean of +1/2 (y wins) and -1/2 (y loses).

    Args:
        preference: (..., n, n), P(y > y') with P(y > y') + P(y' > y) = 1.

    Returns:
        (..., n, n), skew-symmetric, to be divided by tau.
    """
    return preference - 0.5


def bfpo_label_matrix(preference: Tensor, safety: Tensor, *, b1: float, alpha: float) -> Tensor:
    """BFPO's label of every ordered pair, in expectation over which response is the more helpful.

        G(y, y') = P(y > y') g(s, s') - P(y' > y) g(s', s),    g = `bfpo_label`

    (arXiv 2408.15313, eq. 21: the label written without the order of the pair.)  As g is affine in
    either safety label, a probability of being safe gives the mean over independent labels.

    Args:
        preference: (..., n, n), P(y > y') with P(y > y') + P(y' > y) = 1.
        safety: (..., n), labels in {0, 1} or probabilities of being safe.
        b1: weight of the more helpful response's safety, > 1.
        alpha: shift that is subtracted from the label.

    Returns:
        (..., n, n), skew-symmetric, to be divided by tau.

    >>> preference = preference_matrix(torch.tensor([2.0, 1.0]))
    >>> bfpo_label_matrix(preference, torch.tensor([0.0, 1.0]), b1=3.0, alpha=0.5).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    row, column = torch.broadcast_tensors(safety[..., :, None], safety[..., None, :])
    wins = bfpo_label(safe_w=row, safe_l=column, b1=b1, alpha=alpha)
    return preference * wins - preference.mT * wins.mT


def pairwise_optimum(labels: Tensor, tau: float | Tensor, ref_logps: Tensor | None = None) -> Tensor:
    """Log-probs of the policy that minimises the squared loss over all pairs, equally weighted.

        log pi(y) = const + log ref(y) + (1/n) sum_{y'} g(y, y') / tau

    the row means of a skew-symmetric matrix being its best approximation by differences.

    Args:
        labels: (..., n, n), skew-symmetric g(y, y').
        tau: the KL penalty (beta of the code), > 0; a tensor broadcasts with the batch dimensions.
        ref_logps: (..., n), log-probs of the reference in nats; uniform if not given.

    Returns:
        (..., n), normalised log-probs in nats.

    Raises:
        UserError: if ``labels`` is not square or not skew-symmetric.

    >>> labels = ipo_label_matrix(preference_matrix(torch.tensor([2.0, 1.0])))
    >>> log_pi = pairwise_optimum(labels, tau=0.25)
    >>> round((log_pi[0] - log_pi[1]).item(), 4)  # 1 / (2 tau)
    2.0
    """
    _check_skew(labels)
    return _policy(labels.mean(-1), tau, ref_logps)


def weighted_pairwise_optimum(
    labels: Tensor, tau: float | Tensor, weights: Tensor, ref_logps: Tensor | None = None
) -> Tensor:
    """Log-probs of the policy that minimises the squared loss with a weight for every pair.

    Where the derivative of sum_{y,y'} W(y, y') (u(y) - u(y') - g(y, y') / tau)^2 is zero,

        (diag(V 1) - V) u = (V * g) 1 / tau,    V = W + W^T,    log pi = const + log ref + u

    which is the Laplacian of the graph of weights, solved exactly.  Weights of the diagonal do not
    matter.  With W = mu mu^T the solution is u = sum_{y'} mu(y') g(y, y') / tau.

    Args:
        labels: (..., n, n), skew-symmetric g(y, y').
        tau: as in `pairwise_optimum`.
        weights: (..., n, n), how often the ordered pair (y, y') is drawn, >= 0; any scale.
        ref_logps: as in `pairwise_optimum`.

    Returns:
        (..., n), normalised log-probs in nats.

    Raises:
        UserError: if ``labels`` is not skew-symmetric, a weight is negative, or the pairs of
            positive weight do not connect all actions, so that the minimum is not unique.
    """
    _check_skew(labels)
    if not bool((weights >= 0).all()):
        raise UserError("pair weights hold a negative value or NaN; allowed: >= 0")
    both = weights + weights.mT
    _check_connected(both)
    laplacian = torch.diag_embed(both.sum(-1)) - both
    # The null space is the constants, and the right side is orthogonal to it, so adding a multiple
    # of the all-ones matrix makes the system regular and fixes mean(u) = 0.
    scale = torch.diagonal(laplacian, dim1=-2, dim2=-1).mean(-1)[..., None, None]
    regular = laplacian + scale / labels.shape[-1]
    utility = torch.linalg.solve(regular, (both * labels).sum(-1, keepdim=True)).squeeze(-1)
    return _policy(utility, tau, ref_logps)


def _policy(utility: Tensor, tau: float | Tensor, ref_logps: Tensor | None) -> Tensor:
    logits = utility / (tau[..., None] if isinstance(tau, Tensor) else tau)
    return torch.log_softmax(logits if ref_logps is None else logits + ref_logps, dim=-1)


def _check_skew(labels: Tensor) -> None:
    if labels.ndim < 2 or labels.shape[-1] != labels.shape[-2]:
        raise UserError(f"labels have shape {tuple(labels.shape)}; allowed: (..., n, n)")
    off = (labels + labels.mT).abs().max().item()
    if not off <= _ROUNDING * max(1.0, labels.abs().max().item()):
        raise UserError(f"labels are off skew symmetry by {off:.3g}; allowed: g(y, y') = -g(y', y)")


def _check_connected(weights: Tensor) -> None:
    n = weights.shape[-1]
    steps = (weights > 0).to(weights.dtype) + torch.eye(n, dtype=weights.dtype, device=weights.device)
    reached = steps
    for _ in range((n - 1).bit_length()):
        reached = ((reached @ reached) > 0).to(weights.dtype)
    if not bool((reached > 0).all()):
        raise UserError("the pairs of positive weight leave some actions unconnected; allowed: one component")
