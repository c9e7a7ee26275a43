"""The objective of the base and SFT stages: cross-entropy of the response's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bfpo_exp.config.schema import SeededOptimisation
from bfpo_exp.data.batches import BatchOrder
from bfpo_exp.logprobs.padded import PaddedRows, response_logps
from bfpo_exp.train.loop import Sums


class DemonstrationObjective:
    """Mean negative log-likelihood over all response tokens of a step's batch."""

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        optimisation: SeededOptimisation,
        device: torch.device | str,
    ) -> None:
        self.prompt_ids, self.response_ids = prompt_ids, response_ids
        self.optimisation, self.device = optimisation, device
        self.rows = len(prompt_ids)
        streams = np.zeros(self.rows, np.int8)
        self.batches = BatchOrder(optimisation.seed, streams, optimisation.batch, "shuffle")

    def microbatches(self, step: int) -> Iterator[tuple[PaddedRows, int]]:
        """Rows of a step, by length, each with the step's number of response tokens."""
        batch = self.batches[step]
        tokens = sum(len(self.response_ids[i]) for i in batch)
        by_length = sorted(batch, key=lambda i: len(self.prompt_ids[i]) + len(self.response_ids[i]))
        for start in range(0, len(by_length), self.optimisation.microbatch):
            part = by_length[start : start + self.optimisation.microbatch]
            prompts, responses = [self.prompt_ids[i] for i in part], [self.response_ids[i] for i in part]
            yield PaddedRows.of(prompts, responses, self.device), tokens

    def loss(self, model: torch.nn.Module, batch: tuple[PaddedRows, int]) -> tuple[Tensor, Sums]:
        """The rows' summed negative log-likelihood over the step's number of response tokens."""
        rows, tokens = batch
        logps, counts = response_logps(model, rows)  # type: ignore[arg-type]
        return -logps.sum() / tokens, Sums(means={"loss": (-logps.detach().sum(), counts.sum())})
