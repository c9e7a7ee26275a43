"""The losses of preference optimisation, as pure functions, and what is known of each."""

from bfpo_exp.losses.pairwise import bfpo_label, bfpo_loss, dpo_loss, ipo_loss, log_ratio_margin
from bfpo_exp.losses.registry import LOSSES, LossSpec, get_loss, register

__all__ = [
    "LOSSES",
    "LossSpec",
    "bfpo_label",
    "bfpo_loss",
    "dpo_loss",
    "get_loss",
    "ipo_loss",
    "log_ratio_margin",
    "register",
]
