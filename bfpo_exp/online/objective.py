"""The objective of ``loss=morl``: PPO on samples of the policy itself, drawn anew for every rollout.

What is maximised is the paper's multi-objective RL (Section 2),

    E_{x, y ~ pi} [ g(x, y) ] - beta KL(pi || ref),    g the rewards combined into one

by steps on batches of a rollout.  The gradient of the KL penalty has two parts, for an estimate k_t of
each token's divergence: E[ sum_t k_t grad log pi(y) ], for which the estimates are taken off the returns,
and E[ sum_t grad k_t ], for which they are in the loss.  The second part is zero for k1, and for the
other two it must not be left out: k3 in the returns alone, or in the loss alone, has another optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Config
from bfpo_exp.data.batches import BatchOrder
from bfpo_exp.logprobs.head import token_logps
from bfpo_exp.logprobs.paths import Rows, chosen_path
from bfpo_exp.online.exact import exact_kl
from bfpo_exp.online.ppo import clipped, k3, value_loss
from bfpo_exp.online.prepared import Prepared, measured
from bfpo_exp.online.rollout import Prompts, Rollout
from bfpo_exp.online.settings import Morl
from bfpo_exp.online.value import values
from bfpo_exp.train.live_reference import Reference
from bfpo_exp.train.loop import Objective, Sums
from bfpo_exp.train.parts import parts

Controls = tuple[float, float | None]  # beta, and lambda where the rule has one
Sampler = Callable[[int, list[int], float, float | None], Rollout]


@dataclass(frozen=True)
class SampleBatch:
    """A micro-batch of n responses with R tokens in all, those of one response after another.

    Attributes:
        rows: their prompts, each with its samples.
        response: int64 (R,), which of the n responses a token is of.
        share: float32 (R,), the weight of a token's loss within its response: 1, or 1 / its tokens.
        old, reference, values: float32 (R,), as in `Rollout`.
        advantages, returns: float32 (R,).
        scale: float32 (R,), by which the direct part of the KL penalty is multiplied, as advantages were.
        coefficient: beta of the rollout.
        of_responses: float32 (n,) by name: what is measured of whole responses.
    """

    rows: Rows
    response: Tensor
    share: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    scale: Tensor
    coefficient: float
    of_responses: dict[str, Tensor]


class OnlineObjective(Objective[SampleBatch]):
    """Mean PPO loss over a step's responses: ``train.batch`` prompts with ``loss.samples`` responses each.

    ``sampler`` makes a rollout of its number, the rows of its prompts, beta and lambda.  ``steered`` gives
    beta and lambda for the rollout after one.
    """

    def __init__(
        self,
        prompts: Prompts,
        reference: Reference,
        sampler: Sampler,
        steered: Callable[[Rollout], Controls],
        multiplier: float | None,
        config: Config,
        device: torch.device | str,
    ) -> None:
        self.prompts, self.reference, self.config, self.device = prompts, reference, config, device
        self.settings = Morl.model_validate(config.loss.hyperparameters)
        self.sampler, self.steered = sampler, steered
        mode = config.data.batches if len(config.trained_streams) > 1 else "shuffle"
        self.batches = BatchOrder(config.seed, prompts.stream, config.train.batch, mode)
        self.path = chosen_path(config.model, config.data.format.max_length)
        self.rows = len(prompts) * self.settings.epochs
        self.controls: Controls = (self.settings.beta, multiplier)  # of the next rollout
        self.rollout: Rollout | None = None
        self._tokens: dict[int, int] = {}

    def microbatches(self, step: int) -> Iterator[SampleBatch]:
        """This process's responses of a step; at the first step of a rollout it is sampled."""
        settings, size = self.settings, self.config.train.batch
        number, within = divmod(step, settings.batches * settings.epochs)
        if self.rollout is None or self.rollout.number != number:
            drawn = [self.batches[number * settings.batches + i] for i in range(settings.batches)]
            self.rollout = self.sampler(number, np.concatenate(drawn).tolist(), *self.controls)
            self.controls = self.steered(self.rollout)
        first = (within % settings.batches) * size
        lengths = self._lengths(self.rollout)
        self._tokens[step] = sum(sum(lengths[i]) for i in range(first, first + size))
        prepared = Prepared.of(self.rollout, settings)
        for part in parts(range(first, first + size), lengths, self.path, self.config.train):
            yield self._view(self.rollout, prepared, part)

    def loss(self, model: nn.Module, batch: SampleBatch) -> tuple[Tensor, Sums]:
        """The responses' summed loss over the step's number of responses."""
        settings = self.settings
        hidden = self.path.states(model, batch.rows)
        weight: Any = model.get_output_embeddings().weight  # type: ignore[operator]
        logps = token_logps(hidden, weight, batch.rows.targets)
        policy, held = clipped(logps, batch.old, batch.advantages, settings.clip)
        penalty = self._direct_penalty(logps, hidden, weight, batch)
        total = ((policy + batch.coefficient * batch.scale * penalty) * batch.share).sum()
        sums = Sums(means={"clip_fraction": (held.sum(), held.new_tensor(len(held), dtype=torch.int64))})
        if settings.advantages == "value":
            errors = value_loss(values(model, hidden), batch.values, batch.returns, settings.value.clip)
            of_values = _means(errors, batch).sum()
            total = total + settings.value.coefficient * of_values
            sums.means["value_loss"] = (of_values.detach(), _count(batch))
        sums.means["loss"] = (total.detach(), _count(batch))
        for name, column in batch.of_responses.items():
            known = ~torch.isnan(column)
            sums.means[name] = (column[known].sum(), known.sum())
        return total / (self.config.train.batch * settings.samples), sums

    def _direct_penalty(self, logps: Tensor, hidden: Tensor, weight: Tensor, batch: SampleBatch) -> Tensor:
        """The KL estimate of each token as a function of the policy, float32 (R,): its gradient is wanted."""
        if self.settings.kl == "k1":
            return torch.zeros_like(logps)
        if self.settings.kl == "k3":
            return k3(logps, batch.reference)
        of_reference, its_weight = self.reference.applied(
            lambda model: (self.path.states(model, batch.rows), model.get_output_embeddings().weight)  # type: ignore[operator]
        )
        return exact_kl(hidden, weight, of_reference, its_weight.detach())

    def tokens(self, step: int) -> int:
        """Tokens of a step's batch that was taken: of each prompt, and of its responses."""
        return self._tokens.pop(step, 0)

    @property
    def pairs_per_step(self) -> float:
        """A step's responses, counted in pairs."""
        return self.config.train.batch * self.settings.samples / 2

    def state(self) -> dict[str, Any]:
        """What continuing needs beside weights: the rollout, whose policy is gone, and the controls."""
        rollout = None if self.rollout is None else self.rollout.state()
        return {"rollout": rollout, "controls": list(self.controls)}

    def continue_from(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` has given."""
        self.rollout = None if state["rollout"] is None else Rollout.of_state(state["rollout"])
        beta, multiplier = state["controls"]
        self.controls = (beta, multiplier)

    def during(self, model: nn.Module) -> AbstractContextManager[None]:
        """What the model is to be inside of while it is trained."""
        return self.path.during(model)

    def _lengths(self, rollout: Rollout) -> list[tuple[int, ...]]:
        """Tokens of each prompt of a rollout and of its responses."""
        k = rollout.samples
        return [
            (len(self.prompts.ids[row]), *(len(r) for r in rollout.responses[i * k : (i + 1) * k]))
            for i, row in enumerate(rollout.prompts)
        ]

    def _view(self, rollout: Rollout, prepared: Prepared, part: np.ndarray) -> SampleBatch:
        """The responses to these prompts of a rollout."""
        k = rollout.samples
        places = [i * k + j for i in part for j in range(k)]
        responses = [rollout.responses[i] for i in places]
        prompts = [self.prompts.ids[rollout.prompts[i]] for i in part]
        rows = self.path.rows(prompts, [responses[i : i + k] for i in range(0, len(places), k)], self.device)
        lengths = torch.tensor([len(response) for response in responses], device=self.device)
        share = 1.0 / lengths if self.config.loss.logps == "mean" else torch.ones_like(lengths).float()

        def flat(parts: list[list[float]]) -> Tensor:
            return torch.tensor(
                [x for i in places for x in parts[i]], dtype=torch.float32, device=self.device
            )

        return SampleBatch(
            rows=rows,
            response=torch.repeat_interleave(torch.arange(len(places), device=self.device), lengths),
            share=torch.repeat_interleave(share, lengths),
            old=flat(rollout.old),
            reference=flat(rollout.reference),
            values=flat(rollout.values),
            advantages=flat(prepared.advantages),
            returns=flat(prepared.returns),
            scale=flat(prepared.scale),
            coefficient=rollout.coefficient,
            of_responses=measured(rollout, np.array(places), self.device),
        )


def _means(of_tokens: Tensor, batch: SampleBatch) -> Tensor:
    """The mean over each response's tokens, float32 (n,)."""
    n = int(batch.response[-1]) + 1
    sums = torch.zeros(n, device=of_tokens.device).index_add(0, batch.response, of_tokens)
    return sums / torch.bincount(batch.response, minlength=n)


def _count(batch: SampleBatch) -> Tensor:
    return batch.response[-1] + 1
