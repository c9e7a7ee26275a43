"""From a rollout to what a loss takes of it: advantages, and what is logged of its responses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfpo_exp.online.advantages import generalised, group_scale, leave_one_out
from bfpo_exp.online.rollout import Rollout
from bfpo_exp.online.settings import Morl


@dataclass(frozen=True)
class Prepared:
    """What the loss takes of a rollout, each a list of the tokens of each response."""

    advantages: list[list[float]]
    returns: list[list[float]]
    scale: list[list[float]]

    @classmethod
    def of(cls, rollout: Rollout, settings: Morl) -> Prepared:
        """The advantages that the settings ask for."""
        lengths = [len(response) for response in rollout.responses]
        if settings.advantages == "value":
            return cls._of_values(rollout, settings.value.smoothing)
        returns = torch.from_numpy(rollout.penalised).float().view(-1, rollout.samples)
        scale = torch.ones_like(returns)
        if settings.advantages == "group_normalised":
            advantages = returns - returns.mean(1, keepdim=True)
            scale = scale * group_scale(returns)
            advantages = advantages * scale
        else:
            advantages = leave_one_out(returns)

        def over_tokens(per_response: Tensor) -> list[list[float]]:
            pairs = zip(per_response.flatten().tolist(), lengths, strict=True)
            return [[value] * length for value, length in pairs]

        return cls(over_tokens(advantages), over_tokens(returns), over_tokens(scale))

    @classmethod
    def _of_values(cls, rollout: Rollout, smoothing: float) -> Prepared:
        lengths = torch.tensor([len(response) for response in rollout.responses])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]

        def padded(parts: list[list[float]]) -> Tensor:
            flat = torch.tensor([x for part in parts for x in part], dtype=torch.float32)
            return torch.zeros(mask.shape).masked_scatter(mask, flat)

        rewards = -rollout.coefficient * padded(rollout.penalties)
        rewards[torch.arange(len(lengths)), lengths - 1] += torch.tensor(rollout.reward)
        advantages, returns = generalised(rewards, padded(rollout.values), mask, 1.0, smoothing)

        def unpadded(tokens: Tensor) -> list[list[float]]:
            return [row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]

        return cls(unpadded(advantages), unpadded(returns), unpadded(torch.ones_like(advantages)))


def measured(rollout: Rollout, places: np.ndarray, device: torch.device | str) -> dict[str, Tensor]:
    """What is logged of these responses as ``train/<name>``, float32 (n,) each; NaN where it does not apply.

    ``reward`` is the global reward, ``reward_<name>`` those that it is made of, ``kl`` log pi - log ref of
    the whole response, so that its mean estimates KL(pi || ref); ``reward_safe`` and ``reward_unsafe`` are
    beta kl of responses whose safety reward is at least, or less than, one half, as for other losses.
    ``multiplier`` and ``cost`` (1 - safety) are Safe RLHF's.
    """
    kl = rollout.kl[places]
    safe = np.array(rollout.rewards["safety"])[places] >= 0.5
    implied = rollout.coefficient * kl
    found = {
        "reward": np.array(rollout.reward)[places],
        **{f"reward_{name}": np.array(values)[places] for name, values in rollout.rewards.items()},
        "kl": kl,
        "kl_coefficient": np.full(len(places), rollout.coefficient),
        "reward_safe": np.where(safe, implied, np.nan),
        "reward_unsafe": np.where(safe, np.nan, implied),
        "response_tokens": np.array([len(rollout.responses[i]) for i in places]),
    }
    if rollout.multiplier is not None:
        found["multiplier"] = np.full(len(places), rollout.multiplier)
        found["cost"] = 1 - np.array(rollout.rewards["safety"])[places]
    return {name: torch.from_numpy(values).float().to(device) for name, values in found.items()}
