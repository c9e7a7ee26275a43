"""Everything that can be known to be wrong before any compute is spent."""

from __future__ import annotations

from bfpo_exp.config.schema import Config
from bfpo_exp.data.requirements import missing_labels
from bfpo_exp.errors import UserError
from bfpo_exp.eval.kinds import check_tasks
from bfpo_exp.losses import get_loss
from bfpo_exp.models.policy import check_model
from bfpo_exp.models.tokenizers import load_tokenizer
from bfpo_exp.stages.context import demo_mix, stream_mix


def preflight(config: Config) -> None:
    """Read the data and look at the model's folder; a `UserError` for the first thing amiss."""
    check_model(config.model)
    if config.model.path is not None:
        load_tokenizer(
            config.model.path,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    if "evaluate" in config.stages:
        check_tasks(config)
    if "sft" in config.stages:
        demo_mix(config.data)
    if "preference" in config.stages:
        _check_preference(config)


def _check_preference(config: Config) -> None:
    if config.data.batches == "balanced" and config.train.batch % 2:
        raise UserError(
            f"train.batch={config.train.batch} is odd, but data.batches=balanced takes half of it from "
            "each stream; give an even number"
        )
    needs = {"safety"} if get_loss(config.loss.name).needs_safety else set()
    for stream in config.data.streams:
        missing_labels(needs, config.loss.order, stream_mix(config.data, stream), loss=config.loss.name)
