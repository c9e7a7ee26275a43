"""Everything that can be known to be wrong before any compute is spent."""

from __future__ import annotations

from bfpo_exp.config.schema import Config
from bfpo_exp.data.requirements import missing_labels
from bfpo_exp.errors import UserError
from bfpo_exp.eval.kinds import check_tasks
from bfpo_exp.losses import get_loss
from bfpo_exp.models.policy import architecture, check_model, check_trainable
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
    check_trainable(
        config.model, config.train.trainable, config.train.sft.trainable, config.train.base.trainable
    )
    if "evaluate" in config.stages:
        check_tasks(config)
    if "sft" in config.stages:
        demo_mix(config.data)
    if "preference" in config.stages:
        _check_preference(config)
    _check_lengths(config)


def _check_lengths(config: Config) -> None:
    """Sequences longer than the positions that a model knows give nonsense, or an index error."""
    positions = getattr(architecture(config.model), "max_position_embeddings", None)
    longest = {"data.format.max_length": config.data.format.max_length}
    if "evaluate" in config.stages:
        answer = config.eval.sampling.max_new_tokens
        longest["data.format.max_prompt_length + eval.sampling.max_new_tokens"] = (
            config.data.format.max_prompt_length + answer
        )
    for name, tokens in longest.items():
        if positions is not None and tokens > positions:
            raise UserError(
                f"{name} = {tokens} tokens, but the model {config.model.name} has {positions} positions"
            )


def _check_preference(config: Config) -> None:
    if config.data.batches == "balanced" and config.train.batch % 2:
        raise UserError(
            f"train.batch={config.train.batch} is odd, but data.batches=balanced takes half of it from "
            "each stream; give an even number"
        )
    needs = {"safety"} if get_loss(config.loss.name).needs_safety else set()
    for stream in config.data.streams:
        missing_labels(needs, config.loss.order, stream_mix(config.data, stream), loss=config.loss.name)
