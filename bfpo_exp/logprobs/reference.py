"""The reference's log-probs: one pass over the data, shared by every loss, alpha, beta and seed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.distributed import group, sum_, wait
from bfpo_exp.logprobs.paths import LogpsPath, passes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "logps.safetensors"
PARTS = "part-*.safetensors"  # of a pass that is not over
PAIRS, POSITIONS = 32, 16384  # that a forward pass has at most
SAVE_SECONDS = 30.0  # of work that a killed pass loses at most


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


@torch.no_grad()
def reference_logps(
    model: PreTrainedModel,
    pairs: TokenisedPairs,
    path: LogpsPath,
    progress: Callable[[int], None] = lambda done: None,
    folder: Path | None = None,
) -> PairLogps:
    """Log-probs of every pair's two responses, in passes over pairs of similar length.

    Passes are shared out over the processes, whole, so the numbers do not depend on how many there are.
    With a ``folder``, what is done is kept there every `SAVE_SECONDS`, and not done again.
    """
    lengths = pairs.lengths
    order = np.array(sorted(range(len(pairs)), key=lambda i: lengths[i][0] + max(lengths[i][1:])), np.int64)
    every = passes([lengths[i] for i in order], path, PAIRS, POSITIONS)
    found = _Found(len(pairs), folder)
    done = found.load() if folder else set()
    wait()  # all processes have read the same parts before one of them writes another
    progress(sum(end - start for number, (start, end) in enumerate(every) if number in done))
    for number in group().share([number for number in range(len(every)) if number not in done]):
        rows = order[slice(*every[number])]
        prompts = [pairs.prompt_ids[i] for i in rows]
        batch = path.rows(prompts, [(pairs.w_ids[i], pairs.l_ids[i]) for i in rows], model.device)
        found.add(number, rows, *path.logps(model, batch))
        progress(group().size * len(rows))
    return found.whole(model.device)


class _Found:
    """The sums and counts found so far: in earlier tries, kept in files, and by this process.

    Attributes:
        sums: float32 (pairs, 2), of both responses; counts: int64 of the same shape; 0 where another
            process, or an earlier try, has the pair.
    """

    def __init__(self, pairs: int, folder: Path | None) -> None:
        self.folder = folder
        self.sums, self.counts = np.zeros((pairs, 2), np.float32), np.zeros((pairs, 2), np.int64)
        self.before = self.sums.copy(), self.counts.copy()  # of earlier tries
        self._fresh: list[tuple[int, np.ndarray]] = []
        self._saved = time.monotonic()

    def load(self) -> set[int]:
        """The numbers of the passes that earlier tries have done."""
        assert self.folder is not None
        done: set[int] = set()
        for file in sorted(self.folder.glob(PARTS)):
            part = load_file(file)
            self.before[0][part["rows"]], self.before[1][part["rows"]] = part["sums"], part["counts"]
            done |= set(part["passes"].tolist())
        return done

    def add(self, number: int, rows: np.ndarray, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """What one pass has found."""
        self.sums[rows] = sums.view(-1, 2).cpu().numpy()
        self.counts[rows] = counts.view(-1, 2).cpu().numpy()
        self._fresh.append((number, rows))
        if self.folder and time.monotonic() - self._saved > SAVE_SECONDS:
            self._save(self.folder)

    def _save(self, folder: Path) -> None:
        rows = np.concatenate([rows for _, rows in self._fresh])
        numbers = [number for number, _ in self._fresh]
        part = {
            "passes": np.array(numbers, np.int64),
            "rows": rows,
            "sums": self.sums[rows],
            "counts": self.counts[rows],
        }
        file = folder / PARTS.replace("*", f"{numbers[0]}")  # of all processes, only one did this pass
        draft = file.with_suffix(".draft")
        save_file(part, draft)
        os.replace(draft, file)
        self._fresh, self._saved = [], time.monotonic()

    def whole(self, device: torch.device) -> PairLogps:
        """Everything, in every process; the files of a pass that is over have no more use."""
        parts = []
        for array, before in zip((self.sums, self.counts), self.before, strict=True):
            parts.append(sum_(torch.from_numpy(array).to(device)).cpu().numpy() + before)
        for file in self.folder.glob(PARTS) if self.folder and group().main else ():
            file.unlink()
        sums, counts = parts
        return PairLogps(*(np.ascontiguousarray(column) for column in (*sums.T, *counts.T)))
