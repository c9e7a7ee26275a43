"""The losses of preference optimisation, as pure functions, and what is known of each."""

from bfpo_exp.losses.factors import factors_label, factors_score, lexicographic_weights
from bfpo_exp.losses.kto import kto_loss
from bfpo_exp.losses.label import LabelOrderWarning, bfpo_label, cell_labels, order_broken
from bfpo_exp.losses.logistic import dpo_loss, hinge_loss, robust_dpo_loss, simpo_loss
from bfpo_exp.losses.margin import log_ratio_margin
from bfpo_exp.losses.quadratic import bfpo_loss, ipo_loss
from bfpo_exp.losses.registry import LOSSES, LossSpec, get_loss, pairwise_loss, register
from bfpo_exp.losses.safety import bso_loss, modpo_loss, sacpo_loss, safedpo_loss
from bfpo_exp.losses.staged import STAGED, StagedLoss, is_staged

__all__ = [
    "LOSSES",
    "STAGED",
    "LabelOrderWarning",
    "LossSpec",
    "StagedLoss",
    "bfpo_label",
    "bfpo_loss",
    "bso_loss",
    "cell_labels",
    "dpo_loss",
    "factors_label",
    "factors_score",
    "get_loss",
    "hinge_loss",
    "ipo_loss",
    "is_staged",
    "kto_loss",
    "lexicographic_weights",
    "log_ratio_margin",
    "modpo_loss",
    "order_broken",
    "pairwise_loss",
    "register",
    "robust_dpo_loss",
    "sacpo_loss",
    "safedpo_loss",
    "simpo_loss",
]
