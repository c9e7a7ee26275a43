"""Losses that are no functions of pairs: each is trained by a stage of its own.

They stand where a pairwise loss may stand in a config (``loss=...``), with hyper-parameters checked
in the same way, and ``stages.preference.policy`` hands over to their stage.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from bfpo_exp.online.settings import Morl

ATTRIBUTES = {"helpfulness", "safety"}
Level = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class StagedLoss:
    """A loss with a stage of its own.

    Attributes:
        hyperparameters: the schema of its keys beyond those that every loss has.
        needs_rewards: whether it asks ``reward`` for numbers of responses.
        combines: whether ``combine`` makes one number of them.
        steers: whether its policy is told at evaluation what to be (``steer`` of its hyper-parameters).
    """

    name: str
    hyperparameters: type[BaseModel]
    needs_rewards: bool
    combines: bool = False
    steers: bool = False

    @property
    def needs(self) -> list[str]:
        """What the loss must be given, in words."""
        return ["rewards"] if self.needs_rewards else []


class Named(Protocol):
    """Anything that bears a loss's name: the config's node, or what is registered."""

    @property
    def name(self) -> str:
        """The name that the loss's YAML file gives."""


def is_staged(loss: Named) -> bool:
    """Whether this loss has a stage of its own."""
    return loss.name in STAGED


class Hyperparameters(BaseModel):
    """Keys of a loss: no unknown ones, read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _template(text: str) -> str:
    """A format string that writes every attribute, and nothing else."""
    try:
        written = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ValueError(f"it is no template: {error}") from None
    if written != ATTRIBUTES:
        raise ValueError("a template writes {helpfulness} and {safety}, and no other field")
    return text


class Steer(Hyperparameters):
    """What the policy is told to be: a level of each attribute."""

    helpfulness: Level
    safety: Level


class SteerLM(Hyperparameters):
    """Attribute-conditioned fine-tuning (arXiv 2310.05344); `bfpo_exp.steer` says how it is written."""

    levels: Annotated[int, Field(ge=2)]
    template: Annotated[str, AfterValidator(_template)]
    steer: Steer

    @model_validator(mode="after")
    def _steer_is_a_level(self) -> SteerLM:
        for name, level in self.steer:
            if level >= self.levels:
                raise ValueError(f"steer.{name}={level}, but levels={self.levels} are 0 to {self.levels - 1}")
        return self


STAGED: dict[str, StagedLoss] = {
    "morl": StagedLoss("morl", Morl, needs_rewards=True, combines=True),
    "steerlm": StagedLoss("steerlm", SteerLM, needs_rewards=True, steers=True),
}
