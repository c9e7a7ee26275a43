"""What the tests of the losses share: random batches, and hyper-parameters for every loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from bfpo_exp.losses import LOSSES

LOGPS = ("policy_w", "policy_l", "ref_w", "ref_l")
MARGINS = ("margin_w", "margin_l")
SAFETY_LABELS = ("safe_w", "safe_l")

HYPERPARAMETERS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3},
    "cdpo": {"beta": 0.3, "label_smoothing": 0.1},
    "robust_dpo": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"beta": 0.3},
    "bfpo": {"beta": 0.3, "b1": 3.0, "alpha": 0.5},
    "hinge": {"beta": 0.3},
    "simpo": {"beta": 2.0, "gamma": 0.7},
    "kto": {"beta": 0.3, "desirable": 1.0, "undesirable": 1.5},
    "safedpo": {"beta": 0.3, "delta": 4.0},
    "bso": {"beta": 0.3, "penalty": 4.0, "clamp": 30.0},
    "modpo": {"beta": 0.3, "weight": 0.6},
    "sacpo": {"beta": 0.3, "trade_off": 2.0},
}
every_loss = pytest.mark.parametrize("name", sorted(HYPERPARAMETERS))
laws = settings(max_examples=40, deadline=None)
betas, b1s = st.floats(0.01, 10), st.floats(1.1, 10)


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@st.composite
def batches(
    draw: st.DrawFn, largest: float = 300.0, dtypes: tuple[torch.dtype, ...] = (torch.float64,)
) -> dict[str, Tensor]:
    """Log-probs, rewards of a first policy and 0/1 safety labels of 1 to 20 pairs."""
    n, dtype = draw(st.integers(1, 20)), draw(st.sampled_from(dtypes))
    logps = st.lists(st.floats(-largest, largest, width=32), min_size=n, max_size=n)
    labels = st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n)
    batch = {name: draw(logps) for name in (*LOGPS, *MARGINS)}
    batch |= {name: draw(labels) for name in SAFETY_LABELS}
    return {name: torch.tensor(values, dtype=dtype) for name, values in batch.items()}


def logps_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in LOGPS}


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the rewards of a first policy."""
    return {name: batch[name] for name in (*LOGPS, *SAFETY_LABELS)}


def at_reference(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "policy_w": batch["ref_w"], "policy_l": batch["ref_l"]}


def losses_of(name: str, batch: dict[str, Tensor], **changes: Any) -> Tensor:
    return LOSSES[name](batch, {**HYPERPARAMETERS[name], **changes})
