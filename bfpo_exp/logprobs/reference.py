"""The reference's log-probs: one pass over the data, shared by every loss, alpha, beta and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.distributed import group, sum_
from bfpo_exp.logprobs.padded import PaddedRows, response_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "logps.safetensors"
ROWS, TOKENS = 64, 16384  # sequences, and padded tokens, that a forward pass has at most


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs in nats (float32) and token counts (int64) of both responses, shape (pairs,).

    Sums and counts are kept apart, so that losses on sums and losses on means share them.
    """

    w_sum: np.ndarray
    l_sum: np.ndarray
    w_count: np.ndarray
    l_count: np.ndarray

    def save(self, folder: Path) -> None:
        """Write the arrays under ``folder``."""
        save_file({name: np.ascontiguousarray(array) for name, array in vars(self).items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> PairLogps:
        """Read what `save` wrote."""
        return cls(**load_file(folder / FILE))

    @classmethod
    def concatenate(cls, parts: Sequence[PairLogps]) -> PairLogps:
        """The log-probs of several sets of pairs, one after another."""
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])})


def passes(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive rows, from the shortest to the longest, cut into passes: (start, end) of each.

    >>> passes([3, 5000, 6000, 7000, 20000])
    [(0, 2), (2, 4), (4, 5)]
    """
    found, start = [], 0
    for end, length in enumerate(lengths):
        if end > start and (end - start == ROWS or (end + 1 - start) * length > TOKENS):
            found.append((start, end))
            start = end
    return [*found, (start, len(lengths))] if lengths else []


@torch.no_grad()
def reference_logps(
    model: PreTrainedModel, pairs: TokenisedPairs, progress: Callable[[int], None] = lambda done: None
) -> PairLogps:
    """Log-probs of every pair's two responses, in passes over rows of similar length.

    Passes are shared out over the processes, whole, so the numbers do not depend on how many there are.
    """
    prompts = pairs.prompt_ids + pairs.prompt_ids
    responses = pairs.w_ids + pairs.l_ids
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    sums, counts = np.zeros(len(order), np.float32), np.zeros(len(order), np.int64)
    lengths = [len(prompts[i]) + len(responses[i]) for i in order]
    for start, end in group().share(passes(lengths)):
        rows = order[start:end]
        batch = PaddedRows.of([prompts[i] for i in rows], [responses[i] for i in rows], model.device)
        logps, tokens = response_logps(model, batch)
        sums[rows], counts[rows] = logps.cpu().numpy(), tokens.cpu().numpy()
        progress(group().size * len(rows))
    for array in (sums, counts):  # each row is 0 in all processes but one
        array[:] = sum_(torch.from_numpy(array).to(model.device)).cpu().numpy()
    n = len(pairs)
    return PairLogps(sums[:n], sums[n:], counts[:n], counts[n:])
