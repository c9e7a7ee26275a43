"""Everything that can be known to be wrong before any compute is spent."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from bfpo_exp.config.schema import Config, Loss
from bfpo_exp.config.training import Optimisation
from bfpo_exp.data.conversations import sft_format
from bfpo_exp.data.mix import PairMix
from bfpo_exp.data.requirements import missing_labels
from bfpo_exp.errors import UserError
from bfpo_exp.eval.kinds import check_tasks
from bfpo_exp.logprobs.paths import chosen_path
from bfpo_exp.losses import LabelOrderWarning, is_staged, pairwise_loss
from bfpo_exp.losses.label import CELLS
from bfpo_exp.models.lora import check_lora
from bfpo_exp.models.policy import architecture, check_model, check_trainable
from bfpo_exp.models.tokenizers import load_tokenizer
from bfpo_exp.online.check import check_online
from bfpo_exp.paths import home
from bfpo_exp.rewards.check import check_rewards
from bfpo_exp.rewards.use import trains_reward_model
from bfpo_exp.stages.bandit import bandit_settings, bandit_warnings
from bfpo_exp.stages.context import Context, demo_mix, stream_mix
from bfpo_exp.stages.soup import check_soup
from bfpo_exp.stages.steerlm import check_steerlm
from bfpo_exp.store import Store
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train.engines import check_engine
from bfpo_exp.train.optimisers import check_optimiser
from bfpo_exp.train.prepare import check_compile

log = logging.getLogger(__name__)


def preflight(config: Config) -> None:
    """Read the data and look at the model's folder; a `UserError` for the first thing amiss."""
    if "bandit" in config.stages:
        for warning in bandit_warnings(bandit_settings(config)):
            _warn(warning)
    if config.pipeline:
        _check_pipeline(config)


def _check_pipeline(config: Config) -> None:
    check_model(config.model)
    if config.model.path is not None:
        load_tokenizer(
            config.model.path,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
    check_engine(config.deepspeed, *_trained(config))
    for optimisation in _trained(config):
        check_optimiser(optimisation)
    train = config.train
    check_trainable(
        config.model, train.trainable, train.sft.trainable, train.base.trainable, train.reward.trainable
    )
    if "evaluate" in config.stages:
        check_tasks(config)
    if "sft" in config.stages:
        sft_format(config.data.format, config.train.sft.max_length)
        demo_mix(config.data)
    check_rewards(config)
    if "preference" in config.stages:
        _check_preference(config)
    if "soup" in config.stages:
        check_soup(_looking(config))
    _check_lengths(config)


def _looking(config: Config) -> Context:
    """The run as far as its tokenizer, which records nothing."""
    return Context(config, Store(home() / "store"), MetricsFile(os.devnull))


# What losses with a stage of their own do not go with.
OWN_CHECKS: dict[str, Callable[[Config], None]] = {
    "morl": check_online,
    "steerlm": lambda config: check_steerlm(_looking(config)),
}


def _trained(config: Config) -> list[Optimisation]:
    """How the stages that are to be done train."""
    stages = {"base": config.train.base, "sft": config.train.sft, "preference": config.train}
    if trains_reward_model(config):
        stages["reward"] = config.train.reward
    return [optimisation for stage, optimisation in stages.items() if stage in config.stages]


def _check_lengths(config: Config) -> None:
    """Sequences longer than the positions that a model knows give nonsense, or an index error."""
    positions = getattr(architecture(config.model), "max_position_embeddings", None)
    longest = {"data.format.max_length": config.data.format.max_length}
    if "sft" in config.stages and config.train.sft.max_length:
        longest["train.sft.max_length"] = config.train.sft.max_length
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
    check_compile(config.train)
    chosen_path(config.model, config.data.format.max_length)
    if config.train.lora:
        check_lora(config.train.lora, config.model)
    if config.loss.name in OWN_CHECKS:
        OWN_CHECKS[config.loss.name](config)
    loss: Loss | None = None if is_staged(config.loss) else config.loss
    while loss is not None:
        spec = pairwise_loss(loss.name)
        assert loss.order is not None
        needs = {"safety"} if spec.needs_safety else set()
        mixes = [stream_mix(config.data, stream) for stream in loss.streams or config.data.streams]
        for mix in mixes:
            missing_labels(needs, loss.order, mix, loss=loss.name)
        for warning in [*spec.tried(loss.hyperparameters), *_label_warnings(loss, mixes)]:
            _warn(f"loss {loss.name}: {warning}")
        loss = loss.first


@functools.cache
def _warn(text: str) -> None:
    """Say it once, however many jobs of a sweep it holds for."""
    log.warning("warning: %s", text)


def _label_warnings(loss: Loss, mixes: Sequence[PairMix]) -> list[str]:
    """What of the data's safety labels makes a loss that reads them less than it is, in words.

    Labels that never say unsafe (or never safe) make every pair alike.  Labels that are
    probabilities may give pairs of a higher cell a smaller label than pairs of a lower one.
    """
    spec = pairwise_loss(loss.name)
    if not spec.needs_safety:
        return []
    labels = {
        name: torch.from_numpy(np.concatenate([_column(mix, name) for mix in mixes]))
        for name in ("safe_w", "safe_l")
    }
    safe = {name: values >= 0.5 for name, values in labels.items()}
    both = torch.cat(list(safe.values()))
    if both.all() or not both.any():
        one = "safe" if both.all() else "unsafe"
        return [f"every response of its pairs is labelled {one}, so safety has no part in what it prefers"]
    if spec.label is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabelOrderWarning)  # `tried` tells of it
        values = spec.label(**labels, **_taken(spec.label, loss.hyperparameters))
    ranges = {
        cell: (round(inside.min().item(), 4), round(inside.max().item(), 4))
        for cell, (w, l) in CELLS.items()  # noqa: E741
        if len(inside := values[(safe["safe_w"] == bool(w)) & (safe["safe_l"] == bool(l))])
    }
    cells = list(ranges)
    mixed = [f"({a}) and ({b})" for a, b in pairwise(cells) if ranges[a][0] < ranges[b][1]]
    if not mixed:
        return []
    told = ", ".join(f"({cell}) {low:g} to {high:g}" for cell, (low, high) in ranges.items())
    overlap = f"the labels of the cells {', '.join(mixed)} overlap: {told}"
    return [f"the safety labels are probabilities, with which {overlap}"]


def _column(mix: PairMix, name: str) -> np.ndarray:
    return mix.records.select_columns([name]).to_pandas()[name].to_numpy(np.float32)


def _taken(function: Callable[..., object], values: Mapping[str, object]) -> dict[str, object]:
    return {name: values[name] for name in inspect.signature(function).parameters if name in values}
