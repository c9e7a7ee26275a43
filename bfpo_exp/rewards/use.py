"""Which runs read the settings of rewards; to all others they mean nothing."""

from __future__ import annotations

from typing import Any

from bfpo_exp.config.rewards import Fitted, Judge, Learnt
from bfpo_exp.config.schema import Config
from bfpo_exp.losses import StagedLoss, get_loss
from bfpo_exp.tracking.runs import EXACT


def uses_rewards(config: Config) -> bool:
    """Whether the run's loss asks for rewards."""
    spec = get_loss(config.loss.name)
    return "preference" in config.stages and isinstance(spec, StagedLoss) and spec.needs_rewards


def combines_rewards(config: Config) -> bool:
    """Whether the run's loss makes one number of them, by ``combine``."""
    spec = get_loss(config.loss.name)
    return uses_rewards(config) and isinstance(spec, StagedLoss) and spec.combines


def trains_reward_model(config: Config) -> bool:
    """Whether the stage ``reward`` is done: for a loss that uses it, or for its own sake."""
    wanted = uses_rewards(config) or "preference" not in config.stages
    return "reward" in config.stages and isinstance(config.reward, Learnt) and wanted


def unread(config: Config) -> dict[str, Any]:
    """The settings that nothing in the run reads, as pydantic's ``exclude``."""
    exclude: dict[str, Any] = {}
    if not uses_rewards(config) and not trains_reward_model(config):
        exclude["reward"] = True
    if not combines_rewards(config):
        exclude["combine"] = True
    fits = combines_rewards(config) and isinstance(config.combine, Fitted)  # on the pairs that are held out
    if not trains_reward_model(config) and not fits:
        exclude["train"] = {"reward"}
    return exclude


def told(config: Config) -> str:
    """Who gives the rewards, in words for a run's tag."""
    reward = config.reward
    if isinstance(reward, Judge):
        return EXACT
    return "learnt" if isinstance(reward, Learnt) else f"classifier {reward.model}"
