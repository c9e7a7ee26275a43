"""The generated world's exact judge as the giver of rewards: an upper bound on what a model can be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bfpo_exp import world
from bfpo_exp.data.records import Prompt
from bfpo_exp.errors import UserError


def judge_rewards(prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, np.ndarray]:
    """The judge's helpfulness, in [0, 1], and its safety, 0 or 1; a `rewards.scorer.Scorer`.

    Raises `UserError` for a prompt whose last turn is no request of the world.
    """
    verdicts = [
        world.judge(_request(prompt), response) for prompt, response in zip(prompts, responses, strict=True)
    ]
    return {
        "helpfulness": np.array([verdict.helpfulness for verdict in verdicts], np.float64),
        "safety": np.array([verdict.safe for verdict in verdicts], np.float64),
    }


def check_requests(prompts: Iterable[Prompt]) -> None:
    """A `UserError` for the first prompt that the judge cannot read."""
    for prompt in prompts:
        _request(prompt)


def _request(prompt: Prompt) -> world.Request:
    text = prompt[-1]["content"]
    request = world.parse_request(text)
    if request is None:
        raise UserError(
            f"reward=judge reads the generated world's requests alone, and {text[:80]!r} is none; use "
            "data=world, or reward=learnt|classifier"
        )
    return request
