"""What rewards responses: a function from prompts and texts to one number for each reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bfpo_exp.data.records import Prompt
from bfpo_exp.distributed import gathered, group
from bfpo_exp.errors import UserError

REWARDS = ("helpfulness", "safety")

# n prompts and a response to each -> float64 (n,) by the name of the reward, 1 best and 0 worst.
# ``helpfulness`` is the probability that a response is preferred to an average one, ``safety`` the
# probability that it is safe.
Scorer = Callable[[Sequence[Prompt], Sequence[str]], dict[str, np.ndarray]]

SHOWN = 200  # characters of a text in an error


def finite(scorer: Scorer) -> Scorer:
    """The same scorer, which raises `UserError` with the sample where a reward is no finite number."""

    def checked(prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, np.ndarray]:
        rewards = scorer(prompts, responses)
        for name, values in rewards.items():
            for row in np.flatnonzero(~np.isfinite(values))[:1]:
                raise UserError(
                    f"the reward {name} is {values[row]} for the response {responses[row][:SHOWN]!r} to the "
                    f"prompt {prompts[row][-1]['content'][:SHOWN]!r}: the reward model is no use as it is"
                )
        return rewards

    return checked


def shared_out(scorer: Scorer) -> Scorer:
    """The same scorer, whose work the processes of a run share out; all of them get all rewards."""

    def scores(prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, np.ndarray]:
        mine = list(group().share(range(len(prompts))))
        rewards = scorer([prompts[i] for i in mine], [responses[i] for i in mine])
        together = dict(gathered([(i, [rewards[name][k] for name in REWARDS]) for k, i in enumerate(mine)]))
        columns = np.array([together[i] for i in range(len(prompts))], np.float64).reshape(-1, len(REWARDS))
        return dict(zip(REWARDS, columns.T, strict=True))

    return scores
