"""Packing: several conversations in one row, none of which sees another.

A forward pass over packed rows computes few positions that are not tokens, whatever the lengths of
the conversations; the log-probs are those of `padded`, where every conversation has its own row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bfpo_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Document:
    """Token ids, at least one, and of each whether its log-prob is wanted; the first one has none."""

    ids: Sequence[int]
    wanted: Sequence[bool]


@dataclass(frozen=True)
class PackedRows:
    """Documents one after another, padded on the right.

    Attributes:
        input_ids: int64 of shape (rows, length).
        position_ids: int64 of the same shape; they begin again at 0 with every document, which is
            what keeps documents apart, and with the padding.
        wanted_mask: bool of shape (rows, length - 1); true where the log-prob of the token at
            position t + 1 is wanted, so that it lines up with the logits that predict it.
        ends: where documents and paddings end in the rows laid end to end, after a 0; int32.
        longest: tokens of the longest of them.
    """

    input_ids: Tensor
    position_ids: Tensor
    wanted_mask: Tensor
    ends: Tensor
    longest: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[Document]], device: torch.device | str = "cpu") -> PackedRows:
        """Rows of documents."""
        width = max(sum(len(document.ids) for document in row) for row in rows)
        ids, wanted, lengths = [], [], []
        for row in rows:
            for document in row:
                ids.append(torch.tensor(document.ids))
                wanted.append(torch.tensor(document.wanted))
                wanted[-1][0] = False
                lengths.append(len(document.ids))
            if padding := width - sum(len(document.ids) for document in row):
                ids.append(torch.zeros(padding, dtype=torch.int64))
                wanted.append(torch.zeros(padding, dtype=torch.bool))
                lengths.append(padding)
        shape = (len(rows), width)
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(
            torch.cat(ids).view(shape).to(device),
            positions.view(shape).to(device),
            torch.cat(wanted).view(shape)[:, 1:].to(device),
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            max(lengths),
        )


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The items of each row: the longest first, each in the first row with room for it.

    Takes at most 11/9 times the fewest rows possible, plus 6/9 (Dósa, 2007).  Raises `UserError` for
    an item that is longer than a row.

    >>> first_fit_decreasing([3, 7, 2, 5, 1], 8)
    [[1, 4], [3, 0], [2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        if length > capacity:
            raise UserError(f"a conversation of {length} tokens does not fit a packed row of {capacity}")
        place = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(item)
        room[place] -= length
    return rows


def dealt(rows: list[list[int]], lengths: Sequence[int], processes: int, most: int) -> list[list[list[int]]]:
    """Rows in micro-batches: as many for every process, in rounds, of at most ``most`` rows each.

    Micro-batch k is for process k modulo ``processes``.  None is empty, so that processes stay in
    step: with too few rows, rows of several items are halved.  Raises `UserError` if there are
    fewer items than processes.

    >>> dealt([[0, 1], [2], [3]], [3, 3, 5, 4], processes=2, most=2)
    [[[0, 1], [3]], [[2]]]
    >>> dealt([[0, 1], [2], [3]], [3, 3, 5, 4], processes=4, most=2)
    [[[2]], [[3]], [[0]], [[1]]]
    """
    rows = [list(row) for row in rows]
    count = processes * -(-len(rows) // (processes * most))
    while len(rows) < count:
        fullest = max(rows, key=len)
        if len(fullest) < 2:
            raise UserError(
                f"train.sft.packing=true: a step of {sum(map(len, rows))} conversations cannot be shared by "
                f"{processes} processes; raise train.sft.batch"
            )
        rows.append([fullest.pop() for _ in range(len(fullest) // 2)])
    # Neighbours in length lie in different micro-batches, so that all of them take about as long.
    rows.sort(key=lambda row: -sum(lengths[item] for item in row))
    return [rows[start::count] for start in range(count)]


def token_logps(model: PreTrainedModel, rows: PackedRows) -> Tensor:
    """Log-probs of the wanted tokens, 0 elsewhere: float32 of shape (rows, length - 1), in nats."""
    logits = model(
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        # Without a cache and a mask, transformers tells documents apart by the position ids: for eager
        # and sdpa with a mask of its own, for flash attention by the four arguments below.
        use_cache=False,
        cu_seq_lens_q=rows.ends,
        cu_seq_lens_k=rows.ends,
        max_length_q=rows.longest,
        max_length_k=rows.longest,
    ).logits
    targets = rows.input_ids[:, 1:]
    chosen = -F.cross_entropy(
        logits[:, :-1][rows.wanted_mask].float(), targets[rows.wanted_mask], reduction="none"
    )
    return torch.zeros(targets.shape, device=chosen.device).masked_scatter(rows.wanted_mask, chosen)


def row_logps(model: PreTrainedModel, rows: PackedRows) -> tuple[Tensor, Tensor]:
    """Each row's sum of the wanted log-probs (float32, nats), and their number (int64), shape (rows,)."""
    return token_logps(model, rows).sum(-1), rows.wanted_mask.sum(-1)


@torch.no_grad()
def check_isolation(model: PreTrainedModel, device: torch.device | str) -> None:
    """A `UserError` for a model in which a document sees the one before it in its row.

    Two forward passes over a row whose first document alone is changed: what follows it must have
    the same log-probs, bit for bit, as it stands at the same place of the same computation.  Not
    every architecture of transformers keeps packed documents apart, and none says that it does not.
    """
    after = Document([3, 4, 5, 6], [True] * 4)
    training = model.training
    model.eval()  # dropout would differ between the passes
    try:
        one, other = (
            token_logps(model, PackedRows.of([[Document(first, [False] * 3), after]], device))
            for first in ([1, 2, 3], [7, 8, 9])
        )
    except TypeError as error:
        raise UserError(f"train.sft.packing=true, but the model takes no packed rows: {error}") from None
    finally:
        model.train(training)
    if not torch.equal(one, other):
        raise UserError(
            "train.sft.packing=true, but in a model of this architecture packed conversations see one "
            "another; set train.sft.packing=false"
        )
