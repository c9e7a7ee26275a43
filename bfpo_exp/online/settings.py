"""The hyper-parameters of ``loss=morl``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bfpo_exp.config.types import Count, NonNegative, Positive, Share, Strict


class ValueHead(Strict):
    """A linear map from a token's last hidden state to the return that is expected there.

    Attributes:
        coefficient: of its loss beside the policy's.
        clip: how far a value may move from the rollout's within its epochs.
        smoothing: the lambda of generalised advantage estimation.
    """

    coefficient: Positive
    clip: Positive
    smoothing: Share


class Morl(Strict):
    """PPO on the policy's own samples with a KL penalty to the reference.

    Attributes:
        beta: KL penalty (the paper's tau); the first value where ``kl_target`` steers it.
        kl: estimate of the divergence: k1 (log-ratio), k3, or exact for each token.
        kl_target: nats of a response that beta is steered to; None: beta is fixed.
        samples: responses to each prompt.
        batches: of optimisation, in a rollout.
        epochs: passes over a rollout.
        clip: how far the ratio of policy to sampling policy may be from 1.
        advantages: returns over the mean of the prompt's other samples (leave_one_out); the same over the
            standard deviation of the prompt's returns (group_normalised); or over a value head's estimate.
        value: the head of ``advantages=value``.
        max_new_tokens: of a response.
        incomplete: both rewards of a response that is empty or has no end; None: it is scored as it is.
    """

    beta: NonNegative
    kl: Literal["k1", "k3", "exact"]
    kl_target: Positive | None
    samples: Annotated[int, Field(ge=1)]
    batches: Count
    epochs: Count
    clip: Annotated[float, Field(gt=0, lt=1)]
    advantages: Literal["leave_one_out", "group_normalised", "value"]
    value: ValueHead
    max_new_tokens: Count
    incomplete: Share | None

    @model_validator(mode="after")
    def _baseline(self) -> Morl:
        if self.advantages != "value" and self.samples < 2:
            raise ValueError(
                f"advantages={self.advantages} compares the samples of a prompt, and samples={self.samples}; "
                "give at least 2, or use advantages=value"
            )
        if self.kl_target is not None and self.beta == 0:
            raise ValueError(
                "kl_target steers beta by factors, which leave beta=0 as it is; give a beta above 0"
            )
        return self
