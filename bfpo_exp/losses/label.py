"""BFPO's label: how strongly, and in which direction, a pair ordered by helpfulness is preferred."""

from __future__ import annotations

import warnings
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bfpo_exp.errors import UserError
from bfpo_exp.losses.margin import Finite, safety_labels

B1 = Annotated[float, Field(gt=1, allow_inf_nan=False)]

# (s_w, s_l) of the four cells in the order that their labels must have, with 0 in the middle.
CELLS = {"safe, unsafe": (1, 0), "safe, safe": (1, 1), "unsafe, unsafe": (0, 0), "unsafe, safe": (0, 1)}


class LabelOrderWarning(UserWarning):
    """BFPO's four cells do not stand in the order that the paper asks for."""


def bfpo_label(*, safe_w: Tensor, safe_l: Tensor, b1: B1, alpha: Finite) -> Tensor:
    """The label g of a pair ordered by helpfulness (BFPO, eq. 9, with the shift of eq. 14).

        g = b3 (b1 s_w - s_l) - alpha,    b3 = 1 / (b1 - 1)

    ``alpha`` is subtracted, as in the paper's code; the paper adds its negative.  ``safe_w`` and
    ``safe_l`` are labels in {0, 1} or probabilities of being safe, shape (batch,).  ``b1`` and
    ``alpha`` may be tensors that broadcast against them.

    Raises `UserError` for b1 <= 1 and for labels outside [0, 1].  Warns with `LabelOrderWarning`
    where alpha lies outside (0, 1): then the cells' labels lose the order that `order_broken` names.

    >>> s_w, s_l = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    >>> bfpo_label(safe_w=s_w, safe_l=s_l, b1=3.0, alpha=0.5).tolist()
    [1.0, 0.5, -0.5, -1.0]
    """
    if not torch.as_tensor(b1 > 1).all():
        raise UserError(f"b1={b1} is not allowed: b1 is greater than 1, since b3 = 1 / (b1 - 1) is positive")
    if not isinstance(b1, Tensor) and not isinstance(alpha, Tensor) and (broken := order_broken(b1, alpha)):
        warnings.warn(broken, LabelOrderWarning, stacklevel=2)
    safe_w, safe_l = safety_labels(safe_w=safe_w, safe_l=safe_l)
    return (b1 * safe_w - safe_l) / (b1 - 1) - alpha


def cell_labels(b1: float, alpha: float) -> dict[str, float]:
    """The label of each cell "(more helpful, less helpful)", in the order that they must have.

    >>> cell_labels(b1=3.0, alpha=0.5)
    {'safe, unsafe': 1.0, 'safe, safe': 0.5, 'unsafe, unsafe': -0.5, 'unsafe, safe': -1.0}
    """
    return {name: (b1 * w - l) / (b1 - 1) - alpha for name, (w, l) in CELLS.items()}  # noqa: E741


def order_broken(b1: float, alpha: float) -> str | None:
    """What is wrong with the four cells' labels, in one line, or None.

    They must satisfy (safe, unsafe) > (safe, safe) > 0 > (unsafe, unsafe) > (unsafe, safe).  For
    b1 > 1 the outer inequalities always hold, and the inner ones, 1 - alpha > 0 > -alpha, do
    exactly where 0 < alpha < 1, whatever b1 is.
    """
    labels = cell_labels(b1, alpha)
    collapsed = [
        f"({cell}) = {g:.4g} is not {'above' if w else 'below'} 0"
        for (cell, g), (w, _) in zip(labels.items(), CELLS.values(), strict=True)
        if (g <= 0 if w else g >= 0)
    ]
    if not collapsed:
        return None
    values = ", ".join(f"({cell}) {g:.4g}" for cell, g in labels.items())
    return (
        f"alpha={alpha:g} at b1={b1:g} breaks the order of BFPO's labels: {'; '.join(collapsed)}. Labels of "
        f"(more helpful, less helpful): {values}. The order (safe, unsafe) > (safe, safe) > 0 > "
        "(unsafe, unsafe) > (unsafe, safe) holds for 0 < alpha < 1"
    )
