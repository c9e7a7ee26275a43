"""What of a run's rewards can be known to be wrong before anything is trained."""

from __future__ import annotations

import numpy as np

from bfpo_exp.config.rewards import ClassifierReward, Fitted, Judge, Learnt
from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.rewards.classifier import classifier_config, output_number
from bfpo_exp.rewards.judge import check_requests
from bfpo_exp.rewards.scorer import REWARDS
from bfpo_exp.rewards.training import check_reward_model
from bfpo_exp.rewards.use import combines_rewards, trains_reward_model, uses_rewards
from bfpo_exp.stages.context import stream_mix


def check_rewards(config: Config) -> None:
    """A `UserError` for rewards that cannot be had; reads the pairs, and the config of a classifier."""
    reward = config.reward
    if trains_reward_model(config):
        check_reward_model(config.model, config.train.reward)
        _check_labels(config)
    elif "reward" in config.stages and "preference" not in config.stages:
        raise UserError(
            f"stages has reward, but reward={reward.kind} trains no reward model; choose reward=learnt, or "
            "leave the stage out"
        )
    if not uses_rewards(config):
        return
    if isinstance(reward, Learnt) and not trains_reward_model(config):
        raise UserError(
            f"loss={config.loss.name} with reward=learnt needs the stage that trains the reward model, but "
            f"stages=[{','.join(config.stages)}] has no reward; add it, or choose reward=classifier|judge"
        )
    if isinstance(reward, ClassifierReward):
        found = classifier_config(reward.model, "reward.model")
        for name in REWARDS:
            output_number(found, getattr(reward.heads, name).output, f"reward.heads.{name}.output")
    if isinstance(reward, Judge):
        for stream in config.trained_streams:
            check_requests(stream_mix(config.data, stream).records["prompt"])
    if combines_rewards(config) and isinstance(config.combine, Fitted) and not config.train.reward.heldout:
        raise UserError(
            "combine=fitted fits its weights on held-out pairs, and train.reward.heldout=0 holds none out; "
            "set train.reward.heldout=0.1, say"
        )


def _check_labels(config: Config) -> None:
    """A `UserError` for pairs from which one of the two rewards cannot be learnt."""
    names = ["ordered", "safe_w", "safe_l"]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for stream in config.data.streams:
        table = stream_mix(config.data, stream).records.select_columns(names).to_pandas()
        for name in names:
            columns[name].append(table[name].to_numpy(float))
    ordered = np.concatenate(columns["ordered"])
    labels = np.concatenate(columns["safe_w"] + columns["safe_l"])
    labels = labels[~np.isnan(labels)]
    if not ordered.any():
        raise UserError(
            f"reward=learnt learns helpfulness from ordered pairs, and none of the {len(ordered):,} pairs "
            "has an order; supply it with data.ranker.kind=column|model|longer, or use reward=classifier"
        )
    if not len(labels):
        raise UserError(
            f"reward=learnt learns safety from labelled responses, and none of the {len(ordered):,} pairs "
            "has a label; use a source with labels, or reward=classifier"
        )
    if (labels >= 0.5).all() or (labels < 0.5).all():
        one = "safe" if labels[0] >= 0.5 else "unsafe"
        raise UserError(
            f"reward=learnt learns safety from safe and unsafe responses, and all {len(labels):,} labelled "
            f"ones are {one}; add a stream with both (data.streams), or use reward=classifier"
        )
