"""The global reward that BFPO's label stands for, its RL optimum, and where the two part.

Notation of arXiv 2408.15313 on n actions: mu is the distribution that both responses of a pair are
drawn from, s the safety labels, P(y > y') the helpfulness comparison, and

    p(y) = E_{y'~mu} P(y > y'),    E[s] = E_{y~mu} s(y)

All functions take leading batch dimensions ``...``, and keep float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bfpo_exp.theory.pairwise import bfpo_label_matrix


@dataclass(frozen=True)
class Problem:
    """Actions with everything that the two optimisation problems are made of.

    Attributes:
        mu: (..., n), positive, sums to 1: where the responses of pairs come from.
        preference: (..., n, n), P(y > y') in [0, 1], with P(y > y') + P(y' > y) = 1.
        safety: (..., n), labels in {0, 1} or probabilities of being safe.
    """

    mu: Tensor
    preference: Tensor
    safety: Tensor

    @property
    def win_rate(self) -> Tensor:
        """p(y), shape (..., n): the probability of being more helpful than a fresh sample."""
        return (self.preference * self.mu[..., None, :]).sum(-1)

    @property
    def mean_safety(self) -> Tensor:
        """E[s], shape (...)."""
        return (self.mu * self.safety).sum(-1)

    def gap(self) -> Tensor:
        """How far the step of the paper's proof is from exact, per action, shape (..., n).

            delta(y) = E_{y'}[P(y > y') s(y')] - p(y) E[s]

        the covariance, over y', of losing to y and being safe; at most 1/4 in size.
        """
        weighted = self.preference * (self.mu * self.safety)[..., None, :]
        return weighted.sum(-1) - self.win_rate * self.mean_safety[..., None]

    def correlation(self) -> Tensor:
        """Pearson's correlation of p and s under mu, shape (...); NaN where either is constant."""
        p, s = (x - (self.mu * x).sum(-1, keepdim=True) for x in (self.win_rate, self.safety))
        variances = (self.mu * p**2).sum(-1) * (self.mu * s**2).sum(-1)
        return (self.mu * p * s).sum(-1) / variances.sqrt()


@dataclass(frozen=True)
class Constants:
    """A1 and A2 of the reward (s + A1)(p + A2), and the temperature tau_rl at which it is optimised."""

    a1: Tensor
    a2: float
    tau_rl: float

    @classmethod
    def of_label(cls, mean_safety: Tensor, *, b1: float, b2: float, b3: float, tau: float) -> Constants:
        """The constants that the label b3 (b1 s_w - s_l + b2) with penalty tau calls for.

            c = b3 (b1 - 1),    A1 = E[s] + 2 b3 b2 / c,    A2 = b3 / c,    tau_rl = tau / c

        The paper (Section B.4) fixes the scale by c = 1; any other positive c is another tau.
        """
        c = b3 * (b1 - 1)
        return cls(a1=mean_safety + 2 * b3 * b2 / c, a2=b3 / c, tau_rl=tau / c)

    @classmethod
    def of_shift(cls, mean_safety: Tensor, *, b1: float, alpha: float, tau: float) -> Constants:
        """The same for `bfpo_label`, whose b3 is 1 / (b1 - 1) and whose b3 b2 is -alpha.

        A1 = E[s] - 2 alpha,    A2 = 1 / (b1 - 1)
        """
        return cls(a1=mean_safety - 2 * alpha, a2=1 / (b1 - 1), tau_rl=tau)


def bilinear_reward(problem: Problem, constants: Constants) -> Tensor:
    """The global reward (s(y) + A1) (p(y) + A2) of every action, shape (..., n) (eq. 10)."""
    return (problem.safety + constants.a1[..., None]) * (problem.win_rate + constants.a2)


def rl_optimum(reward: Tensor, tau: float, ref_logps: Tensor) -> Tensor:
    """Log-probs of pi* = ref exp(reward / tau) / Z, the maximum of E_pi[reward] - tau KL(pi || ref).

    Args:
        reward: (..., n), of any offset.
        tau: the KL penalty, > 0.
        ref_logps: (..., n), log-probs of the reference in nats.
    """
    return torch.log_softmax(ref_logps + reward / tau, dim=-1)


def supervised_optimum(problem: Problem, *, b1: float, alpha: float, tau: float, ref_logps: Tensor) -> Tensor:
    """Log-probs of the minimum of E[(h - g / tau)^2], both responses drawn from mu (eq. 8).

        log pi(y) = const + log ref(y) + E_{y'~mu} G(y, y') / tau,    G = `bfpo_label_matrix`

    `weighted_pairwise_optimum` solves the normal equations for any other sampling of pairs.
    """
    labels = bfpo_label_matrix(problem.preference, problem.safety, b1=b1, alpha=alpha)
    utility = (labels * problem.mu[..., None, :]).sum(-1)
    return torch.log_softmax(ref_logps + utility / tau, dim=-1)


def total_variation(logp: Tensor, logq: Tensor) -> Tensor:
    """Half the L1 distance of two distributions given by their log-probs (..., n); in [0, 1]."""
    return (logp.exp() - logq.exp()).abs().sum(-1) / 2


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats, shape (...), from log-probs (..., n)."""
    return (logp.exp() * (logp - logq)).sum(-1)


def spread(values: Tensor) -> Tensor:
    """Largest less smallest of the last dimension: what is left of values defined up to a constant."""
    return values.amax(-1) - values.amin(-1)


@dataclass(frozen=True)
class Comparison:
    """How far the supervised optimum is from the RL optimum of the bilinear reward, shape (...) each.

    ``kl`` is KL(supervised || RL) and ``log_ratio`` the spread of log(supervised / RL), in nats.
    """

    total_variation: Tensor
    kl: Tensor
    log_ratio: Tensor


def compare_optima(problem: Problem, *, b1: float, alpha: float, tau: float) -> Comparison:
    """Solve both problems with mu as the reference and measure how far apart they are.

    In theory log(supervised / RL) = delta(y) / tau + const, with delta = `Problem.gap`.
    """
    ref_logps = problem.mu.log()
    supervised = supervised_optimum(problem, b1=b1, alpha=alpha, tau=tau, ref_logps=ref_logps)
    constants = Constants.of_shift(problem.mean_safety, b1=b1, alpha=alpha, tau=tau)
    rl = rl_optimum(bilinear_reward(problem, constants), constants.tau_rl, ref_logps)
    return Comparison(
        total_variation=total_variation(supervised, rl),
        kl=kl_divergence(supervised, rl),
        log_ratio=spread(supervised - rl),
    )
