"""What the losses share: types of hyper-parameters, checks of what they are given, the margin h.

Notation of the BFPO paper (arXiv 2408.15313).  For a pair (y_w, y_l) in the order that the loss
trains on, with pi the policy and ref the frozen reference,

    h = [log pi(y_w) - log pi(y_l)] - [log ref(y_w) - log ref(y_l)]

In every loss ``policy_w`` is log pi(y_w) and so on: tensors of shape (batch,) in nats, summed over
the response's tokens, or averaged where the setting ``loss.logps`` says so.  Lower precisions are
raised to float32 first; float64 stays.  ``ref_w`` and ``ref_l`` may be None: the loss is then free
of a reference, which is to take a uniform one.  Every loss returns a tensor of shape (batch,), so
that whoever averages decides over what.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bfpo_exp.errors import UserError

Beta = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]  # at one half the label says nothing

MOST_ROWS = 8  # that an error names


def at_least_float32(x: Tensor) -> Tensor:
    """Lower precisions as float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def log_probs(**given: Tensor | None) -> tuple[Tensor, ...]:
    """The log-probs in at least float32; None, of a loss without reference, becomes 0.

    Raises `UserError` with the rows of the batch in which any is NaN or infinite.  Only the CPU is
    looked at here, where looking costs nothing; on a GPU it would make every step wait.
    """
    for name, values in given.items():
        if values is not None and values.device.type == "cpu":
            refuse_rows(~torch.isfinite(values), f"{name} is not finite", values)
    return tuple(torch.zeros(()) if values is None else at_least_float32(values) for values in given.values())


def safety_labels(**given: Tensor) -> tuple[Tensor, ...]:
    """Safety labels in at least float32; `UserError` with the rows of those outside [0, 1].

    A label is 1 (safe), 0 (unsafe) or a probability of being safe.
    """
    for name, values in given.items():
        if values.device.type == "cpu":
            refuse_rows(~((values >= 0) & (values <= 1)), f"{name} is outside [0, 1]", values)
    return tuple(at_least_float32(values) for values in given.values())


def refuse_rows(bad: Tensor, what: str, values: Tensor) -> None:
    """A `UserError` that names the first rows where ``bad``, bool of shape (batch,), holds."""
    if not bad.any():
        return
    rows = bad.reshape(-1).nonzero().flatten().tolist()
    more = f" and {len(rows) - MOST_ROWS} more" if len(rows) > MOST_ROWS else ""
    first = ", ".join(map(str, rows[:MOST_ROWS]))
    raise UserError(
        f"{what} in batch rows {first}{more} (row {rows[0]}: {values.reshape(-1)[rows[0]].item()})"
    )


def log_ratio_margin(
    *, policy_w: Tensor, policy_l: Tensor, ref_w: Tensor | None, ref_l: Tensor | None
) -> Tensor:
    """The margin h of the log-ratios, in nats; swapping the two responses negates it."""
    policy_w, policy_l, ref_w, ref_l = log_probs(
        policy_w=policy_w, policy_l=policy_l, ref_w=ref_w, ref_l=ref_l
    )
    return (policy_w - policy_l) - (ref_w - ref_l)
