"""The objective of the base and SFT stages: cross-entropy of the trained tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bfpo_exp.config.training import SeededOptimisation
from bfpo_exp.data.batches import BatchOrder
from bfpo_exp.distributed import group
from bfpo_exp.logprobs.packed import (
    Document,
    PackedRows,
    check_isolation,
    dealt,
    first_fit_decreasing,
    row_logps,
)
from bfpo_exp.logprobs.padded import PaddedRows, response_logps
from bfpo_exp.train.loop import Objective, Sums

Rows = PaddedRows | PackedRows


class DemonstrationObjective(Objective[tuple[Rows, int]]):
    """Mean negative log-likelihood over all trained tokens of a step's batch.

    The arguments hold a conversation's token ids each, and may be columns that are read from disk
    as they are asked for.  ``trained`` says of each token of a response whether it is trained; None:
    all are.  With ``row_length``, conversations are packed in rows of at most so many tokens, and a
    micro-batch is ``optimisation.microbatch`` such rows; None: every conversation is a row.  The
    batch is ``optimisation.batch`` conversations in any case, and so are loss and gradients.

    Raises `UserError`, at the first packed micro-batch, for a model that cannot keep packed
    conversations apart.
    """

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        optimisation: SeededOptimisation,
        device: torch.device | str,
        *,
        trained: Sequence[Sequence[bool]] | None = None,
        row_length: int | None = None,
    ) -> None:
        self.prompt_ids, self.response_ids, self.trained = prompt_ids, response_ids, trained
        self.optimisation, self.device = optimisation, device
        self.row_length = row_length
        self.rows = len(prompt_ids)
        streams = np.zeros(self.rows, np.int8)
        self.batches = BatchOrder(optimisation.seed, streams, optimisation.batch, "shuffle")
        self._isolated = False

    def microbatches(self, step: int) -> Iterator[tuple[Rows, int]]:
        """This process's rows of a step, each with the whole step's number of trained tokens.

        Every process has as many; with packing their number differs from step to step.
        """
        batch = [self._conversation(i) for i in self.batches[step].tolist()]
        tokens = sum(sum(trained) for _, _, trained in batch)
        parts = self._padded(batch) if self.row_length is None else self._packed(batch, self.row_length)
        return ((rows, tokens) for rows in parts)

    def loss(self, model: torch.nn.Module, batch: tuple[Rows, int]) -> tuple[Tensor, Sums]:
        """The rows' summed negative log-likelihood over the step's number of trained tokens."""
        rows, tokens = batch
        if isinstance(rows, PackedRows):
            if not self._isolated:
                check_isolation(model, self.device)  # type: ignore[arg-type]
                self._isolated = True
            logps, counts = row_logps(model, rows)  # type: ignore[arg-type]
        else:
            logps, counts = response_logps(model, rows)  # type: ignore[arg-type]
        return -logps.sum() / tokens, Sums(means={"loss": (-logps.detach().sum(), counts.sum())})

    def _conversation(self, row: int) -> Conversation:
        response = self.response_ids[row]
        trained = [True] * len(response) if self.trained is None else self.trained[row]
        return self.prompt_ids[row], response, trained

    def _padded(self, batch: list[Conversation]) -> Iterator[PaddedRows]:
        """By length, so that micro-batches waste little padding."""
        mine = group().share(sorted(batch, key=_length))
        for start in range(0, len(mine), self.optimisation.microbatch):
            part = mine[start : start + self.optimisation.microbatch]
            prompts, responses, trained = zip(*part, strict=True)
            rows = PaddedRows.of(prompts, responses, self.device)
            flags = torch.cat([torch.tensor(flags) for flags in trained]).to(self.device)
            mask = rows.response_mask.masked_scatter(rows.response_mask, flags)
            yield dataclasses.replace(rows, response_mask=mask)

    def _packed(self, batch: list[Conversation], row_length: int) -> Iterator[PackedRows]:
        """In rows that are full, so that micro-batches waste little padding whatever the lengths."""
        lengths = [_length(conversation) for conversation in batch]
        rows = first_fit_decreasing(lengths, row_length)
        for part in group().share(dealt(rows, lengths, group().size, self.optimisation.microbatch)):
            yield PackedRows.of([[_document(batch[i]) for i in row] for row in part], self.device)


Conversation = tuple[Sequence[int], Sequence[int], Sequence[bool]]  # prompt, response, what is trained of it


def _length(conversation: Conversation) -> int:
    return len(conversation[0]) + len(conversation[1])


def _document(conversation: Conversation) -> Document:
    prompt, response, trained = conversation
    return Document([*prompt, *response], [*[False] * len(prompt), *trained])
