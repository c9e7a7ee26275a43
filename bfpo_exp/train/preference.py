"""The objective of the preference stage: a pairwise loss on the policy's and reference's log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bfpo_exp.config.schema import Config
from bfpo_exp.data.batches import BatchOrder
from bfpo_exp.data.pairs import TokenisedPairs, order_signs
from bfpo_exp.logprobs.padded import PaddedRows, response_logps
from bfpo_exp.logprobs.reference import PairLogps
from bfpo_exp.losses import get_loss, log_ratio_margin
from bfpo_exp.train.loop import Sums


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch of n pairs, in the order that the loss trains on.

    Attributes:
        rows: 2 n rows, first every y_w, then every y_l.
        ref_w, ref_l: the reference's log-probs, reduced as the loss asks; float32 (n,).
        safe_w, safe_l: safety labels, NaN where there is none; float32 (n,).
    """

    rows: PaddedRows
    ref_w: Tensor
    ref_l: Tensor
    safe_w: Tensor
    safe_l: Tensor


class PreferenceObjective:
    """Mean loss over a step's pairs."""

    def __init__(
        self, pairs: TokenisedPairs, reference: PairLogps, config: Config, device: torch.device | str
    ) -> None:
        self.pairs, self.config, self.device = pairs, config, device
        self.spec = get_loss(config.loss.name)
        self.rows = len(pairs)
        self.batches = BatchOrder(config.seed, pairs.stream, config.train.batch, config.data.batches)
        self.first_is_w = order_signs(pairs, config.loss.order) > 0
        self.lengths = [
            len(prompt) + max(len(first), len(second))
            for prompt, first, second in zip(pairs.prompt_ids, pairs.w_ids, pairs.l_ids, strict=True)
        ]
        mean = config.loss.logps == "mean"
        self.reference_w = reference.w_sum / reference.w_count if mean else reference.w_sum
        self.reference_l = reference.l_sum / reference.l_count if mean else reference.l_sum

    def tokens(self, step: int) -> int:
        """Tokens of a step's batch, prompts counted once for each response."""
        return sum(
            2 * len(self.pairs.prompt_ids[i]) + len(self.pairs.w_ids[i]) + len(self.pairs.l_ids[i])
            for i in self.batches[step]
        )

    def microbatches(self, step: int) -> Iterator[PairBatch]:
        """The pairs of a step, by length, so that micro-batches waste little padding."""
        batch = np.array(sorted(self.batches[step], key=self.lengths.__getitem__))
        for start in range(0, len(batch), self.config.train.microbatch):
            yield self.view(batch[start : start + self.config.train.microbatch])

    def view(self, indices: np.ndarray) -> PairBatch:
        """These pairs as the loss trains on them: swapped where its order says so."""
        pairs, keep = self.pairs, self.first_is_w[indices]

        def ordered(of_w: np.ndarray, of_l: np.ndarray) -> tuple[Tensor, Tensor]:
            first = np.where(keep, of_w[indices], of_l[indices])
            second = np.where(keep, of_l[indices], of_w[indices])
            return torch.from_numpy(first).to(self.device), torch.from_numpy(second).to(self.device)

        prompts = [pairs.prompt_ids[i] for i in indices]
        first = [(pairs.w_ids if k else pairs.l_ids)[i] for i, k in zip(indices, keep, strict=True)]
        second = [(pairs.l_ids if k else pairs.w_ids)[i] for i, k in zip(indices, keep, strict=True)]
        return PairBatch(
            PaddedRows.of(prompts + prompts, first + second, self.device),
            *ordered(self.reference_w, self.reference_l),
            *ordered(pairs.safe_w, pairs.safe_l),
        )

    def loss(self, model: torch.nn.Module, batch: PairBatch) -> tuple[Tensor, Sums]:
        """The pairs' summed loss over the step's number of pairs."""
        logps, counts = response_logps(model, batch.rows)  # type: ignore[arg-type]
        if self.config.loss.logps == "mean":
            logps = logps / counts
        policy_w, policy_l = logps.chunk(2)
        tensors = {
            "policy_w": policy_w, "policy_l": policy_l, "ref_w": batch.ref_w, "ref_l": batch.ref_l,
            "safe_w": batch.safe_w, "safe_l": batch.safe_l,
        }  # fmt: skip
        losses = self.spec(tensors, self.config.loss.hyperparameters)
        with torch.no_grad():
            sums = self._statistics({name: t.detach() for name, t in tensors.items()}, losses.detach())
        return losses.sum() / self.config.train.batch, sums

    def _statistics(self, tensors: dict[str, Tensor], losses: Tensor) -> Sums:
        hyperparameters = self.config.loss.hyperparameters
        at_reference = {**tensors, "policy_w": tensors["ref_w"], "policy_l": tensors["ref_l"]}
        h = log_ratio_margin(**{k: tensors[k] for k in ("policy_w", "policy_l", "ref_w", "ref_l")})
        wanted = self.spec.wanted_sign(tensors, hyperparameters)
        ratios = torch.cat([tensors["policy_w"] - tensors["ref_w"], tensors["policy_l"] - tensors["ref_l"]])
        rewards = hyperparameters.get("beta", 1.0) * ratios
        safe = torch.cat([tensors["safe_w"], tensors["safe_l"]])  # comparisons with NaN are false
        cells = {
            f"cell_{a}_{b}": (in_a(tensors["safe_w"]) & in_b(tensors["safe_l"])).sum()
            for a, in_a in SAFETY.items()
            for b, in_b in SAFETY.items()
        }

        def mean(values: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
            of = torch.ones_like(values, dtype=torch.bool) if of is None else of
            return values[of].sum(), of.sum()

        return Sums(
            means={
                "loss": mean(losses),
                "loss_at_reference": mean(self.spec(at_reference, hyperparameters)),
                "margin": mean(h),
                "accuracy": mean((h * wanted > 0).float(), wanted != 0),
                "kl": mean(-ratios),
                "reward_safe": mean(rewards, safe >= 0.5),
                "reward_unsafe": mean(rewards, safe < 0.5),
            },
            totals=cells,
        )


SAFETY = {"safe": lambda s: s >= 0.5, "unsafe": lambda s: s < 0.5}
