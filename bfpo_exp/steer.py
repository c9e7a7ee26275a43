"""Attributes of responses in words: rewards as levels, and levels at the end of a prompt (SteerLM).

SteerLM (Dong et al., arXiv 2310.05344) fine-tunes a model on responses whose quality stands in the
prompt, and asks it for the best afterwards.  Nothing here knows of models.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from bfpo_exp.config.types import Strict
from bfpo_exp.data.records import Message, Prompt

ATTRIBUTES = {"helpfulness", "safety"}
Level = Annotated[int, Field(ge=0)]


def _template(text: str) -> str:
    """A format string that writes every attribute, and nothing else."""
    try:
        written = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ValueError(f"it is no template: {error}") from None
    if written != ATTRIBUTES:
        raise ValueError("a template writes {helpfulness} and {safety}, and no other field")
    return text


class Steer(Strict):
    """What the policy is told to be: a level of each attribute."""

    helpfulness: Level
    safety: Level


class SteerLM(Strict):
    """The hyper-parameters of ``loss=steerlm``.

    Attributes:
        levels: into how many the range of a reward is cut; the best is ``levels - 1``.
        template: what says the levels at the end of a prompt.
        steer: the levels that are asked for at evaluation.
    """

    levels: Annotated[int, Field(ge=2)]
    template: Annotated[str, AfterValidator(_template)]
    steer: Steer

    @model_validator(mode="after")
    def _steer_is_a_level(self) -> SteerLM:
        for name, level in self.steer:
            if level >= self.levels:
                raise ValueError(f"steer.{name}={level}, but levels={self.levels} are 0 to {self.levels - 1}")
        return self


def quantised(rewards: np.ndarray, levels: int) -> np.ndarray:
    """Rewards in [0, 1], float (n,), as the number of the equal part they lie in; int64 (n,).

    >>> quantised(np.array([0.0, 0.09, 0.1, 0.55, 0.9, 1.0]), 10).tolist()
    [0, 0, 1, 5, 9, 9]
    """
    # Rewards that are meant to be 0.3 may come as 0.29999999999999998 of a sum.
    parts = np.floor(np.round(np.asarray(rewards, np.float64) * levels, 9)).astype(np.int64)
    return parts.clip(0, levels - 1)


def attribute_text(loss: SteerLM, levels: Mapping[str, int]) -> str:
    """What says the levels in a prompt."""
    return loss.template.format(**levels)


def steered(prompt: Sequence[Message], text: str) -> Prompt:
    """The prompt with a text at the end of its last user turn.

    >>> steered([{"role": "user", "content": "How ?"}], " safety 9")
    [{'role': 'user', 'content': 'How ? safety 9'}]
    """
    last = max(place for place, turn in enumerate(prompt) if turn["role"] == "user")
    turn = Message(role="user", content=prompt[last]["content"] + text)
    return [*prompt[:last], turn, *prompt[last + 1 :]]


def unspelled(tokenizer: Any, loss: SteerLM) -> list[str]:
    """The words of the attributes that the tokenizer has no tokens for, in the order of their levels.

    Words end at white space.  A tokenizer without a token for the unknown can spell every word.
    """
    if tokenizer.unk_token_id is None:
        return []
    every = itertools.product(range(loss.levels), repeat=2)
    texts = (attribute_text(loss, {"helpfulness": h, "safety": s}) for h, s in every)
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    return [word for word, of_word in zip(words, ids, strict=True) if tokenizer.unk_token_id in of_word]
