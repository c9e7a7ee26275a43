"""How a rollout is made: responses sampled, scored, and their log-probs found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bfpo_exp.config.rewards import Combination
from bfpo_exp.config.schema import Config
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.distributed import gathered, group
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.head import token_logps
from bfpo_exp.logprobs.paths import LogpsPath, passes
from bfpo_exp.models.sampling import sample
from bfpo_exp.online.exact import exact_kl
from bfpo_exp.online.ppo import k1, k3
from bfpo_exp.online.rollout import Prompts, Rollout
from bfpo_exp.online.settings import Morl
from bfpo_exp.online.value import no_values, values
from bfpo_exp.rewards.combine import combined
from bfpo_exp.rewards.scorer import Scorer
from bfpo_exp.train.live_reference import Reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS, POSITIONS = 32, 16384  # of a forward pass without gradients, at most


class RolloutSampler:
    """Makes rollouts with the weights that the model has at the time.

    It is to be made before the model attends in rows of shared prompts.  ``keep`` is given every rollout
    with the texts of its responses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: Reference,
        prompts: Prompts,
        scorer: Scorer,
        rule: Combination,
        chat: ChatFormat,
        path: LogpsPath,
        config: Config,
        keep: Callable[[Rollout, list[str]], None],
    ) -> None:
        self.model, self.reference, self.prompts = model, reference, prompts
        self.scorer, self.rule = scorer, rule
        self.chat, self.path, self.config, self.keep = chat, path, config, keep
        self.settings = Morl.model_validate(config.loss.hyperparameters)
        self._attention = model.config._attn_implementation

    def __call__(self, number: int, rows: list[int], coefficient: float, multiplier: float | None) -> Rollout:
        """The rollout of these prompts; the same in every process."""
        ids = [self.prompts.ids[row] for row in rows for _ in range(self.settings.samples)]
        with _as_for_evaluation(self.model, self._attention):
            responses = sample(
                self.model,
                self.chat,
                ids,
                temperature=1.0,
                max_new_tokens=self.settings.max_new_tokens,
                batch=self.config.eval.sampling.batch,
                seed=f"rollout/{self.config.seed}/{number}",
            )
        texts = [self.chat.text(response) for response in responses]
        rewards = self._scored(rows, responses, texts)
        every = {name: torch.tensor(scores, dtype=torch.float32) for name, scores in rewards.items()}
        flagged = torch.from_numpy(self.prompts.stream[rows] == 1).repeat_interleave(self.settings.samples)
        reward = combined(self.rule, every, flagged, multiplier or 0.0)
        rollout = Rollout(
            number=number,
            prompts=rows,
            responses=responses,
            **self._of_tokens(rows, responses),
            rewards=rewards,
            reward=reward.tolist(),
            coefficient=coefficient,
            multiplier=multiplier,
        )
        self.keep(rollout, texts)
        return rollout

    def _scored(
        self, rows: Sequence[int], responses: list[list[int]], texts: list[str]
    ) -> dict[str, list[float]]:
        """Each reward of each response, as scored or as ``incomplete`` says."""
        k = self.settings.samples
        messages = [self.prompts.messages[rows[i // k]] for i in range(len(texts))]
        found = {name: scores.tolist() for name, scores in self.scorer(messages, texts).items()}
        least = self.settings.incomplete
        if least is not None:
            for i, response in enumerate(responses):
                if not texts[i] or response[-1] != self.chat.end_of_turn_id:
                    for scores_of in found.values():
                        scores_of[i] = least
        return found

    @torch.no_grad()
    def _of_tokens(self, rows: Sequence[int], responses: list[list[int]]) -> dict[str, list[list[float]]]:
        """Log-probs of policy and reference, KL estimates and values of each response's tokens."""
        k = self.settings.samples
        by_length = sorted(range(len(rows)), key=lambda i: len(self.prompts.ids[rows[i]]))
        lengths = [
            (len(self.prompts.ids[rows[i]]), *(len(r) for r in responses[i * k : (i + 1) * k]))
            for i in by_length
        ]
        found: list[tuple[int, list[list[float]]]] = []
        for start, end in group().share(passes(lengths, self.path, PROMPTS, POSITIONS)):
            part = by_length[start:end]
            several = [responses[i * k : (i + 1) * k] for i in part]
            batch = self.path.rows([self.prompts.ids[rows[i]] for i in part], several, self.model.device)
            counts = [len(response) for responses in several for response in responses]
            columns = [tokens.cpu().split(counts) for tokens in self._tokens_of(batch)]
            places = [i * k + j for i in part for j in range(k)]
            for place, tokens in zip(places, zip(*columns, strict=True), strict=True):
                found.append((place, [values.tolist() for values in tokens]))
        whole = dict(gathered(found))
        names = ("old", "reference", "penalties", "values")
        return {name: [whole[i][n] for i in range(len(responses))] for n, name in enumerate(names)}

    def _tokens_of(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """As `_of_tokens`, of the R tokens of a forward pass; float32 (R,) each."""

        def of(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            hidden = self.path.states(model, batch)
            weight: Any = model.get_output_embeddings().weight  # type: ignore[operator]
            return hidden, weight, token_logps(hidden, weight, batch.targets)

        hidden, weight, old = of(self.model)
        of_reference, its_weight, reference = self.reference.applied(of)
        kinds = {
            "k1": lambda: k1(old, reference),
            "k3": lambda: k3(old, reference),
            "exact": lambda: exact_kl(hidden, weight, of_reference, its_weight),
        }
        for name, logps in (("policy", old), ("reference", reference)):
            if not torch.isfinite(logps).all():
                raise UserError(
                    f"the {name}'s log-probs of its own samples are not finite: lower train.lr "
                    f"({self.config.train.lr}), or set train.clip ({self.config.train.clip})"
                )
        learned = values if self.settings.advantages == "value" else lambda _, states: no_values(states)
        return old, reference, kinds[self.settings.kl](), learned(self.model, hidden)


@contextmanager
def _as_for_evaluation(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """The model samples with its own attention and a KV cache, which gradient checkpointing would forbid."""
    before = model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    model.config._attn_implementation = attention
    for module in training:
        module.training = False
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for module in training:
            module.training = True


def distinct_prompts(messages: Sequence[Any], ids: Sequence[Sequence[int]], stream: np.ndarray) -> Prompts:
    """Each prompt of each stream once, in the order in which they come first."""
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    for row, tokens in enumerate(ids):
        seen.setdefault((int(stream[row]), tuple(tokens)), row)
    rows = list(seen.values())
    return Prompts([messages[row] for row in rows], [ids[row] for row in rows], stream[rows])
