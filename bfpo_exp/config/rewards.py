"""Who rewards responses, and how the rewards of a response become one number.

Two unions, told apart by ``reward.kind`` and ``combine.rule``: each kind has the settings that it
uses and no others.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from bfpo_exp.config.types import Finite, NonNegative, Positive, Share, Strict


def _output(value: Any) -> Any:
    """Outputs are counted from 0, or named."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError("an output is its number from 0, or its name")
    if isinstance(value, int) and value < 0:
        raise ValueError("outputs are counted from 0")
    return value


Output = Annotated[int | str, BeforeValidator(_output)]


class Head(Strict):
    """How an output of a classifier becomes a reward: ``squash(scale * (logit - centre))``.

    Attributes:
        output: the output's number from 0, or its name in the classifier's ``id2label``.
        scale: below 0 where a larger logit is a worse response.
        squash: ``sigmoid`` for logits; ``none`` for outputs that lie in [0, 1] after scaling.
    """

    output: Output
    centre: Finite
    scale: Finite
    squash: Literal["sigmoid", "none"]

    @model_validator(mode="after")
    def _says_something(self) -> Head:
        if self.scale == 0:
            raise ValueError("scale=0 makes every reward the same; give another number")
        return self


class Heads(Strict):
    """The head of each reward."""

    helpfulness: Head
    safety: Head


class Learnt(Strict):
    """A reward model that the stage ``reward`` trains on the run's own pairs."""

    kind: Literal["learnt"]


class ClassifierReward(Strict):
    """A pretrained sequence classifier: its folder, or a hub id pinned as ``owner/name@commit``."""

    kind: Literal["classifier"]
    model: Annotated[str, AfterValidator(os.path.expanduser)]
    heads: Heads


class Judge(Strict):
    """The generated world's exact judge: what no reward model can be better than."""

    kind: Literal["judge"]


Reward = Annotated[Learnt | ClassifierReward | Judge, Field(discriminator="kind")]


class Weights(Strict):
    """A weight for each reward."""

    helpfulness: NonNegative
    safety: NonNegative

    @model_validator(mode="after")
    def _not_nothing(self) -> Weights:
        if self.helpfulness == self.safety == 0:
            raise ValueError("all weights are 0; one of them has to be above it")
        return self


class Linear(Strict):
    """A weighted sum."""

    rule: Literal["linear"]
    weights: Weights


class Llama2(Strict):
    """Safety for prompts of the safety stream and where it is below ``threshold``, else helpfulness."""

    rule: Literal["llama2"]
    threshold: Share


class Lagrangian(Strict):
    """Helpfulness less a multiplier times the cost, steered so that the mean cost keeps to ``limit``.

    ``multiplier`` is where it starts, ``rate`` that of its dual ascent; ``normalised`` divides by 1 plus it.
    """

    rule: Literal["lagrangian"]
    limit: Share
    multiplier: NonNegative
    rate: NonNegative
    normalised: bool


class MaxMin(Strict):
    """The worse of the two."""

    rule: Literal["max_min"]


class Bilinear(Strict):
    """(safety + a1) (helpfulness + a2)."""

    rule: Literal["bilinear"]
    a1: Finite
    a2: Finite


class Fitted(Strict):
    """A weighted sum whose weights order held-out pairs as wanted, by ``margin`` where they can."""

    rule: Literal["fitted"]
    margin: Positive
    penalty: NonNegative


Combination = Linear | Llama2 | Lagrangian | MaxMin | Bilinear  # what needs nothing beyond its settings
Combine = Annotated[Combination | Fitted, Field(discriminator="rule")]
