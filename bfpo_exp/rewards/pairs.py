"""The pairs that a reward model is trained and measured on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.data.records import Prompt
from bfpo_exp.rewards.scorer import REWARDS, Scorer


@dataclass(frozen=True)
class RewardPairs:
    """n pairs in the canonical order (more helpful, less helpful), as token ids and as texts.

    Attributes:
        tokens: ids and labels.
        prompts, responses_w, responses_l: the texts that the ids are of.
        heldout: bool (n,), the pairs that are measured on and not trained on; no prompt is on both sides.
    """

    tokens: TokenisedPairs
    prompts: list[Prompt]
    responses_w: list[str]
    responses_l: list[str]
    heldout: np.ndarray

    def rewards(self, scorer: Scorer, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What a scorer gives to both responses of these pairs, float64 (rows, 2) by reward."""
        prompts = [self.prompts[i] for i in rows for _ in range(2)]
        responses = [text for i in rows for text in (self.responses_w[i], self.responses_l[i])]
        given = scorer(prompts, responses)
        return {name: given[name].reshape(-1, 2) for name in REWARDS}
