"""Numbers that are steered while a run trains: the KL penalty's coefficient and Safe RLHF's multiplier."""

from __future__ import annotations


def adapted(coefficient: float, kl: float, target: float, gain: float = 0.1) -> float:
    """The coefficient of the KL penalty for the next rollout, so that the KL comes to its target.

    beta <- beta (1 + gain e) with the error e = KL / target - 1 held within 0.2 (Ziegler et al., 2019,
    arXiv 1909.08593, Section 2.2).

    >>> round(adapted(0.1, kl=30.0, target=10.0), 6), adapted(0.1, kl=10.0, target=10.0)
    (0.102, 0.1)
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return coefficient * (1 + gain * error)


def ascended(multiplier: float, cost: float, limit: float, rate: float) -> float:
    """Dual ascent on a multiplier: lambda <- max(0, lambda + rate (E[cost] - limit)).

    So lambda grows while the mean cost of the policy's samples is above its limit (Safe RLHF, arXiv
    2310.12773, eq. 11).

    >>> ascended(1.0, cost=0.5, limit=0.25, rate=2.0), ascended(0.1, cost=0.0, limit=0.25, rate=2.0)
    (1.5, 0.0)
    """
    return max(0.0, multiplier + rate * (cost - limit))
