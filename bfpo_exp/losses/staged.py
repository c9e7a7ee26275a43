"""Losses that are no functions of pairs: each is trained by a stage of its own.

They stand where a pairwise loss may stand in a config (``loss=...``), with hyper-parameters checked
in the same way, and ``stages.preference.policy`` hands over to their stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel

from bfpo_exp.online.settings import Morl
from bfpo_exp.steer import SteerLM


@dataclass(frozen=True)
class StagedLoss:
    """A loss with a stage of its own.

    Attributes:
        hyperparameters: the schema of its keys beyond those that every loss has.
        needs_rewards: whether it asks ``reward`` for numbers of responses.
        combines: whether ``combine`` makes one number of them.
        samples: whether its policy samples while it trains, so that its rows are prompts, and every process
            needs the plain model with whole weights.
        cuts_by_tokens: whether its micro-batches may be cut by tokens.
        steers: whether its policy is told at evaluation what to be (``steer`` of its hyper-parameters).
    """

    name: str
    hyperparameters: type[BaseModel]
    needs_rewards: bool
    combines: bool = False
    samples: bool = False
    cuts_by_tokens: bool = True
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


STAGED: dict[str, StagedLoss] = {
    "morl": StagedLoss("morl", Morl, needs_rewards=True, combines=True, samples=True),
    "steerlm": StagedLoss("steerlm", SteerLM, needs_rewards=True, cuts_by_tokens=False, steers=True),
}
