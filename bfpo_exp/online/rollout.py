"""One rollout: the policy's samples with all that its updates need of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rollout:
    """Responses to prompts, k each; prompt after prompt, n in all.

    Attributes:
        number: of the rollout, from 0.
        prompts: rows of the prompts.
        responses: token ids of the n responses.
        old, reference: log-probs in nats of each response's tokens, of the sampling policy and the reference.
        penalties: the KL estimate of each token.
        values: the value head's estimate before each token; empty without one.
        rewards: by name, of the n responses, as scored.
        reward: the n global rewards.
        coefficient: beta of this rollout.
        multiplier: lambda of this rollout; None where the rule has none.
    """

    number: int
    prompts: list[int]
    responses: list[list[int]]
    old: list[list[float]]
    reference: list[list[float]]
    penalties: list[list[float]]
    values: list[list[float]]
    rewards: dict[str, list[float]]
    reward: list[float]
    coefficient: float
    multiplier: float | None = None

    @property
    def samples(self) -> int:
        """k, the responses to each prompt."""
        return len(self.responses) // len(self.prompts)

    @property
    def kl(self) -> np.ndarray:
        """Each response's log pi_old - log ref, summed; float64 (n,): its mean estimates KL(pi || ref)."""
        pairs = zip(self.old, self.reference, strict=True)
        return np.array([sum(old) - sum(reference) for old, reference in pairs])

    @property
    def penalised(self) -> np.ndarray:
        """Returns: global reward - beta * KL estimate, summed over the response; float64 (n,)."""
        return np.array(self.reward) - self.coefficient * np.array([sum(p) for p in self.penalties])

    def state(self) -> dict[str, Any]:
        """The rollout as JSON, exactly."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Rollout:
        """What `state` has given."""
        return cls(**state)


@dataclass(frozen=True)
class Prompts:
    """What is sampled for: messages, token ids and stream (0 helpfulness, 1 safety) of each prompt."""

    messages: Sequence[Any]
    ids: Sequence[Sequence[int]]
    stream: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)
