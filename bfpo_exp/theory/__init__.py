"""The paper's theory on finite sets of actions, where every expectation is a sum (docs/theory.md)."""

from bfpo_exp.theory.bilinear import (
    Comparison,
    Constants,
    Problem,
    bilinear_reward,
    compare_optima,
    kl_divergence,
    rl_optimum,
    spread,
    supervised_optimum,
    total_variation,
)
from bfpo_exp.theory.measure import Measured, by_size, by_strength, order_by_shift
from bfpo_exp.theory.order import in_wanted_order, shift_band
from bfpo_exp.theory.pairwise import (
    bfpo_label_matrix,
    ipo_label_matrix,
    pairwise_optimum,
    preference_matrix,
    weighted_pairwise_optimum,
)
from bfpo_exp.theory.problems import independent_ranking_problem, levels_problem, uncorrelated_problem

__all__ = [
    "Comparison",
    "Constants",
    "Measured",
    "Problem",
    "bfpo_label_matrix",
    "bilinear_reward",
    "by_size",
    "by_strength",
    "compare_optima",
    "in_wanted_order",
    "independent_ranking_problem",
    "ipo_label_matrix",
    "kl_divergence",
    "levels_problem",
    "order_by_shift",
    "pairwise_optimum",
    "preference_matrix",
    "rl_optimum",
    "shift_band",
    "spread",
    "supervised_optimum",
    "total_variation",
    "uncorrelated_problem",
    "weighted_pairwise_optimum",
]
