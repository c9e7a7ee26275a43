"""The engine that a config names."""

from __future__ import annotations

from torch import nn

from bfpo_exp.config.training import Deepspeed, Optimisation
from bfpo_exp.distributed import group
from bfpo_exp.errors import UserError
from bfpo_exp.train.engine import Engine, PlainEngine


def make_engine(
    deepspeed: Deepspeed,
    module: nn.Module,
    trained: list[nn.Parameter],
    optimisation: Optimisation,
    steps: int,
) -> Engine:
    """An engine that steps ``trained``, parameters of ``module``, over ``steps`` steps."""
    if deepspeed.config is None:
        return PlainEngine(module, trained, optimisation, steps)
    from bfpo_exp.train.deepspeed import ZeroEngine

    return ZeroEngine(module, trained, optimisation, steps, deepspeed.config)


def check_engine(deepspeed: Deepspeed, *several: Optimisation) -> None:
    """A `UserError` for an engine that cannot run here, or batches that it cannot share out."""
    for optimisation in several:
        if optimisation.batch % group().size:
            raise UserError(
                f"a batch of {optimisation.batch} cannot be shared out evenly over {group().size} processes; "
                f"give a multiple of {group().size}, or start another number of processes"
            )
    if deepspeed.config is not None:
        from bfpo_exp.train.deepspeed import check_settings

        check_settings(deepspeed.config)
