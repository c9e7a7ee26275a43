"""The optimisers by name: one place that knows which numbers of the config each of them takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from bfpo_exp.config.training import Optimisation
from bfpo_exp.errors import UserError

FUSED = ("cpu", "cuda")  # devices on which torch steps all of AdamW in one kernel
INSTALL_8BIT = "pip install bitsandbytes"


def check_optimiser(optimisation: Optimisation) -> None:
    """A `UserError` for an optimiser that cannot run here, before anything is loaded."""
    if optimisation.optimizer != "adamw_8bit":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"optimizer=adamw_8bit needs bitsandbytes ({INSTALL_8BIT}); without it: adamw, rmsprop"
        ) from None
    if not torch.cuda.is_available():
        raise UserError("optimizer=adamw_8bit needs a GPU; without one: adamw, rmsprop")


def make_optimiser(trained: Sequence[nn.Parameter], optimisation: Optimisation) -> Optimizer:
    """An optimiser of these parameters at the peak rate.

    - ``adamw``: Loshchilov and Hutter (2019), both ``betas``, decoupled weight decay.
    - ``rmsprop``: ``betas[1]`` is its smoothing constant (torch's ``alpha``), ``betas[0]`` is not used: it
      has no momentum.  Its mean of squares starts at 0 and is not corrected for that, so its first steps
      are up to (1 - betas[1])^-1/2 times as long as AdamW's.  Weight decay is added to the gradient.
    - ``adamw_8bit``: AdamW with both moments in 8 bits (Dettmers et al., 2022, arXiv 2110.02861); a GPU
      and bitsandbytes are needed, else a `UserError`.
    """
    smoothing, lr, decay = optimisation.betas[1], optimisation.lr, optimisation.weight_decay
    if optimisation.optimizer == "rmsprop":
        return torch.optim.RMSprop(trained, lr=lr, alpha=smoothing, weight_decay=decay)
    if optimisation.optimizer == "adamw_8bit":
        check_optimiser(optimisation)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=lr, betas=optimisation.betas, weight_decay=decay)
    return torch.optim.AdamW(
        trained,
        lr=lr,
        betas=optimisation.betas,
        weight_decay=decay,
        fused=all(parameter.device.type in FUSED for parameter in trained),
    )
