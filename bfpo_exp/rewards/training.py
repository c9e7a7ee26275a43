"""A reward model with two heads, and the objective that trains both at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bfpo_exp.config.schema import Model
from bfpo_exp.config.training import RewardOptimisation
from bfpo_exp.data.batches import BatchOrder
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.distributed import group
from bfpo_exp.errors import UserError
from bfpo_exp.models.numerics import DTYPES, resolved_attention, tell_numerics
from bfpo_exp.models.policy import architecture, select_trainable
from bfpo_exp.rewards.classifier import padded
from bfpo_exp.rewards.scorer import REWARDS
from bfpo_exp.train.loop import Objective, Sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTPUTS = dict(enumerate(REWARDS))  # the model's id2label


def bradley_terry(better: Tensor, worse: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l) of each pair; float32 (n,) (Bradley and Terry, 1952).

    >>> bradley_terry(torch.tensor([2.0]), torch.tensor([2.0]))
    tensor([0.6931])
    """
    return -F.logsigmoid(better - worse)


@dataclass(frozen=True)
class RewardBatch:
    """A micro-batch of n pairs, the n more helpful responses before the n others.

    Attributes:
        ids, mask: int64 (2 n, longest), padded on the right.
        ordered: bool (n,), whether it is known which response is more helpful.
        safe: float32 (2 n,), the safety labels, NaN where there is none.
        orders, labels: how many of these the whole step has, in all processes.
    """

    ids: Tensor
    mask: Tensor
    ordered: Tensor
    safe: Tensor
    orders: int
    labels: int


class RewardObjective(Objective[RewardBatch]):
    """Bradley-Terry on helpfulness plus cross-entropy of the safety labels, each a mean over the step.

    ``used`` says which of the pairs are trained on, bool (pairs,); those with neither an order nor a
    label are left out in any case.
    """

    def __init__(
        self,
        pairs: TokenisedPairs,
        used: np.ndarray,
        optimisation: RewardOptimisation,
        pad_id: int,
        device: torch.device | str,
    ) -> None:
        self.pairs, self.optimisation, self.pad_id, self.device = pairs, optimisation, pad_id, device
        self.labelled = (~np.isnan(np.stack([pairs.safe_w, pairs.safe_l]))).sum(0)
        used = used & (pairs.ordered | (self.labelled > 0))
        self.rows = int(used.sum())
        self.batches = BatchOrder(optimisation.seed, pairs.stream, optimisation.batch, "shuffle", used)

    def microbatches(self, step: int) -> Iterator[RewardBatch]:
        """This process's pairs of a step, as many as every other has; by length, to waste no padding."""
        batch = self.batches[step]
        orders, labels = int(self.pairs.ordered[batch].sum()), int(self.labelled[batch].sum())
        lengths = self.pairs.lengths
        mine = group().share(sorted(batch.tolist(), key=lambda i: lengths[i][0] + max(lengths[i][1:])))
        for start in range(0, len(mine), self.optimisation.microbatch):
            yield self._view(mine[start : start + self.optimisation.microbatch], orders, labels)

    def _view(self, rows: Sequence[int], orders: int, labels: int) -> RewardBatch:
        pairs = self.pairs
        sequences = [pairs.prompt_ids[i] + ids[i] for ids in (pairs.w_ids, pairs.l_ids) for i in rows]
        ids, mask = padded(sequences, self.pad_id, self.device)
        at = np.array(rows)
        safe = np.concatenate([pairs.safe_w[at], pairs.safe_l[at]])
        ordered = torch.from_numpy(pairs.ordered[at])
        return RewardBatch(
            ids, mask, ordered.to(self.device), torch.from_numpy(safe).to(self.device), orders, labels
        )

    def loss(self, model: nn.Module, batch: RewardBatch) -> tuple[Tensor, Sums]:
        """The micro-batch's share of the step's two means, in float32."""
        helpful, safe = model(input_ids=batch.ids, attention_mask=batch.mask).logits.float().unbind(1)
        better, worse = (part[batch.ordered] for part in helpful.chunk(2))
        by_order = bradley_terry(better, worse)
        known = ~batch.safe.isnan()
        by_label = F.binary_cross_entropy_with_logits(safe[known], batch.safe[known], reduction="none")
        loss = by_order.sum() / max(1, batch.orders) + by_label.sum() / max(1, batch.labels)
        means = {"helpfulness_loss": by_order.detach(), "safety_loss": by_label.detach()}
        return loss, Sums(
            means={name: (values.sum(), values.new_tensor(len(values))) for name, values in means.items()}
        )


def new_reward_model(
    path: str | Path, config: Model, *, own: bool, pad_id: int, seed: int, device: torch.device
) -> PreTrainedModel:
    """The backbone of the model at ``path`` with a new output layer, drawn from ``seed``; in evaluation mode.

    The layer's weights are normal with variance 1 / (hidden + 1) (Stiennon et al., 2020, arXiv 2009.01325).
    """
    from transformers import AutoModelForSequenceClassification

    tell_numerics(config)
    model = AutoModelForSequenceClassification.from_pretrained(
        str(path),
        revision=None if own else config.revision,
        trust_remote_code=False,
        dtype=DTYPES[config.dtype],
        attn_implementation=resolved_attention(config),
        use_safetensors=True,
        id2label=OUTPUTS,
        label2id={name: number for number, name in OUTPUTS.items()},
        pad_token_id=pad_id,
    )
    weight = output_layer(model).weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.copy_(drawn / math.sqrt(weight.shape[1] + 1))
    return model.eval().to(device)


def output_layer(model: nn.Module) -> nn.Linear:
    """The layer that makes a reward model's outputs of the last token's state."""
    layer = model.score
    assert isinstance(layer, nn.Linear)
    return layer


def select_trained(model: nn.Module, optimisation: RewardOptimisation) -> None:
    """Freeze everything but the chosen weights and the output layer, which is new."""
    select_trainable(model, optimisation.trainable)
    output_layer(model).requires_grad_(True)


def check_reward_model(config: Model, optimisation: RewardOptimisation) -> None:
    """A `UserError` for a model that cannot become a reward model, or has not the weights to train."""
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                architecture(config), trust_remote_code=False
            )
        output_layer(model)
    except (ValueError, AttributeError, AssertionError):
        kind = architecture(config).model_type
        raise UserError(
            f"reward=learnt cannot make a reward model of the model {config.name}: transformers has no "
            f"sequence classifier of one linear layer for models of type {kind}; use reward=classifier"
        ) from None
    select_trained(model, optimisation)
