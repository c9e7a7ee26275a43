"""Measurements on random problems: the gap, what it does to the optimum, and the range of shifts.

Every function is a function of its arguments, seed included.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bfpo_exp.losses import LabelOrderWarning
from bfpo_exp.theory.bilinear import Comparison, Problem, compare_optima, spread, supervised_optimum
from bfpo_exp.theory.order import in_wanted_order
from bfpo_exp.theory.problems import independent_ranking_problem, levels_problem

B1, ALPHA = 3.0, 0.5  # the paper's


@dataclass(frozen=True)
class Measured:
    """What was measured on the problems of one setting; every tensor has the shape (count,)."""

    setting: float  # strength of the dependence, or number of actions
    correlation: Tensor
    gap_spread: Tensor  # largest less smallest delta over actions
    by_tau: dict[float, Comparison]


def measure(setting: float, problem: Problem, taus: Sequence[float], b1: float, alpha: float) -> Measured:
    """Gap and distances between the two optima of every problem, for every tau."""
    return Measured(
        setting=setting,
        correlation=problem.correlation(),
        gap_spread=spread(problem.gap()),
        by_tau={tau: compare_optima(problem, b1=b1, alpha=alpha, tau=tau) for tau in taus},
    )


def by_strength(
    strengths: Sequence[float],
    taus: Sequence[float],
    *,
    levels: int = 8,
    count: int = 400,
    seed: int = 0,
    b1: float = B1,
    alpha: float = ALPHA,
) -> list[Measured]:
    """Distances against how strongly safety depends on helpfulness (`levels_problem`).

    Every strength sees the same levels, so that along a line only the dependence changes.
    """

    def drawn(strength: float) -> Problem:
        return levels_problem(count, levels, torch.Generator().manual_seed(seed), strength)

    return [measure(strength, drawn(strength), taus, b1, alpha) for strength in strengths]


def by_size(
    sizes: Sequence[int],
    taus: Sequence[float],
    *,
    count: int = 400,
    seed: int = 0,
    b1: float = B1,
    alpha: float = ALPHA,
) -> list[Measured]:
    """Distances against the number of actions, labels independent of a strict ranking."""
    generator = torch.Generator().manual_seed(seed)
    return [measure(n, independent_ranking_problem(count, n, generator), taus, b1, alpha) for n in sizes]


def order_by_shift(
    alphas: Sequence[float], n: int, *, count: int = 400, seed: int = 0, b1: float = B1
) -> list[float]:
    """For every alpha, the share of random labelled rankings whose optimum is in the wanted order."""
    problem = independent_ranking_problem(count, n, torch.Generator().manual_seed(seed))
    ref_logps = problem.mu.log()
    shares = []
    for alpha in alphas:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LabelOrderWarning)  # the ends of the range break the label itself
            log_pi = supervised_optimum(problem, b1=b1, alpha=alpha, tau=1.0, ref_logps=ref_logps)
        right = in_wanted_order(log_pi - ref_logps, problem.win_rate, problem.safety)
        shares.append(right.double().mean().item())
    return shares
