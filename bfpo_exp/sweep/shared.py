"""What the jobs of a sweep share, so that it can be made once, ahead of them.

A scheduler that starts every job at once would have most of them wait while one makes the base
model.  `shared_stages` says what to make first, and which jobs wait for it; it is made by

    python -m bfpo_exp.sweep.job SWEEP_DIR --only base,sft NUMBER
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bfpo_exp.config.schema import Config, Stage
from bfpo_exp.hashing import stable_hash
from bfpo_exp.losses.staged import is_staged
from bfpo_exp.rewards.use import trains_reward_model

MODELS: tuple[Stage, ...] = ("base", "sft")


@dataclass(frozen=True)
class Shared:
    """Stages whose results several jobs share.

    Attributes:
        stages: what is to be made, for `bfpo_exp.run.make_ahead`.
        numbers: the jobs that wait for it; the config of any of them makes it.
        after: place in the list of what is to be made before it; None: nothing.
    """

    stages: tuple[Stage, ...]
    numbers: tuple[int, ...]
    after: int | None = None


def shared_stages(configs: Mapping[int, Config]) -> list[Shared]:
    """What at least two of these jobs share: models first, then reward models and log-probs made with them.

    Jobs are put together by the parts of their configs that `bfpo_exp.stages` makes the keys of its
    results of.  Groups that differ may still share an entry of the store, such as the log-probs of one
    of their streams; it is made once all the same.
    """
    found: list[Shared] = []
    models: dict[str, list[int]] = {}
    for number, config in configs.items():
        if _model_stages(config):
            models.setdefault(stable_hash(_models_part(config)), []).append(number)
    place: dict[str, int] = {}
    for key, numbers in models.items():
        if len(numbers) > 1:
            place[key] = len(found)
            found.append(Shared(_model_stages(configs[numbers[0]]), tuple(numbers)))
    rewards: dict[tuple[str, str], list[int]] = {}
    references: dict[tuple[str, str], list[int]] = {}
    for number, config in configs.items():
        if trains_reward_model(config):
            keys = stable_hash(_models_part(config)), stable_hash(_reward_part(config))
            rewards.setdefault(keys, []).append(number)
        if _needs_reference(config):
            keys = stable_hash(_models_part(config)), stable_hash(_reference_part(config))
            references.setdefault(keys, []).append(number)
    groups: list[tuple[Stage, dict[tuple[str, str], list[int]]]]
    groups = [("reward", rewards), ("reference", references)]
    for stage, jobs in groups:
        for (model, _), numbers in jobs.items():
            if len(numbers) > 1:
                stages = (*_model_stages(configs[numbers[0]]), stage)
                found.append(Shared(stages, tuple(numbers), place.get(model)))
    return found


def _model_stages(config: Config) -> tuple[Stage, ...]:
    """The stages that make the model which the preference stage starts from; pretrained weights need none."""
    made = [stage for stage in MODELS if stage in config.stages]
    return () if made == ["base"] and config.model.path is not None else tuple(made)


def _needs_reference(config: Config) -> bool:
    """Whether the log-probs of a reference on the pairs are taken ahead of training."""
    trains = bool({"reference", "preference"} & set(config.stages))
    return trains and config.train.reference == "cached" and not is_staged(config.loss)


def _models_part(config: Config) -> list[Any]:
    """What the base and SFT model are made of; demonstrations are the same whatever pairs are trained on."""
    return [
        _model_stages(config),
        config.model.model_dump(exclude={"name"}),
        config.data.model_dump(include={"seed", "heldout", "sft", "ranker", "format"}),
        config.train.base.model_dump(),
        config.train.sft.model_dump() if "sft" in config.stages else None,
        config.deepspeed.model_dump(),
        config.threads,
    ]


def _reward_part(config: Config) -> list[Any]:
    """What a reward model is made of beside the model that it starts from."""
    return [*_pairs_part(config), config.train.reward.model_dump()]


def _reference_part(config: Config) -> list[Any]:
    """What the pairs are made of whose log-probs are taken: those of the loss that is trained first."""
    first = config.loss
    while first.first is not None:
        first = first.first
    return [*_pairs_part(config), sorted(first.streams or config.data.streams)]


def _pairs_part(config: Config) -> list[Any]:
    streams = set(config.data.streams)
    pairs = {
        name: source.model_dump() for name, source in config.data.pairs.items() if source.stream in streams
    }
    return [sorted(streams), pairs]
