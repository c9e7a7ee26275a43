"""Values that are each allowed, but not together."""

from __future__ import annotations

from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.losses import StagedLoss, get_loss


def check_together(config: Config) -> None:
    """A `UserError` for the first values of a config that contradict each other."""
    if "preference" not in config.stages:
        return
    train, engine = config.train, config.deepspeed
    if config.data.batches == "balanced" and train.batch % 2:
        raise UserError(
            f"train.batch={train.batch} is odd, but data.batches=balanced takes half of it from "
            "each stream; give an even number"
        )
    if train.reference == "live" and train.lora is None and engine.stage == 3:
        raise UserError(
            f"train.reference=live needs whole weights in every process, which deepspeed={engine.name} "
            "does not keep; use train.reference=cached, adapters (train=lora), or deepspeed=none|zero1|zero2"
        )
    loss = get_loss(config.loss.name)
    if isinstance(loss, StagedLoss):
        _check_staged(loss, config)


def _check_staged(loss: StagedLoss, config: Config) -> None:
    train, engine = config.train, config.deepspeed
    if loss.samples and engine.stage == 3:
        raise UserError(
            f"loss={loss.name} samples from the policy, whose weights deepspeed={engine.name} keeps in "
            "parts; use deepspeed=none|zero1|zero2"
        )
    if loss.samples and train.compile:
        raise UserError(
            f"train.compile=true is for losses on pairs: loss={loss.name} also samples from the model"
        )
    if not loss.cuts_by_tokens and train.tokens_per_microbatch is not None:
        raise UserError(
            f"loss={loss.name} cuts its batches by train.microbatch; set train.tokens_per_microbatch=null"
        )
