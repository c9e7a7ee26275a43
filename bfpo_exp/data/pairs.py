"""Tokenised pairs in memory, and the orders in which a loss may train on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

Order = Literal["helpfulness", "safety", "stream"]
HELPFULNESS_STREAM, SAFETY_STREAM = 0, 1


@dataclass(frozen=True)
class TokenisedPairs:
    """Pairs in the canonical order (more helpful, less helpful); n pairs.

    Attributes:
        prompt_ids, w_ids, l_ids: n lists of token ids; responses include their end of turn.
        safe_w, safe_l: float32 (n,), 1 safe, 0 unsafe, NaN where there is no label.
        safer: int8 (n,), +1 where w is the safer response, -1 where l is, 0 where it is not known.
        ordered: bool (n,), whether it is known which response is more helpful.
        stream: int8 (n,), 0 helpfulness, 1 safety.
    """

    prompt_ids: list[list[int]]
    w_ids: list[list[int]]
    l_ids: list[list[int]]
    safe_w: np.ndarray
    safe_l: np.ndarray
    safer: np.ndarray
    ordered: np.ndarray
    stream: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @functools.cached_property
    def lengths(self) -> list[tuple[int, int, int]]:
        """Tokens of each pair's prompt and of its two responses."""
        ids = zip(self.prompt_ids, self.w_ids, self.l_ids, strict=True)
        return [(len(prompt), len(w), len(l)) for prompt, w, l in ids]  # noqa: E741

    @classmethod
    def of(cls, parts: Sequence[Dataset]) -> TokenisedPairs:
        """Tokenised data sets, one after another."""
        columns: dict[str, list | np.ndarray] = {}
        for name in (field.name for field in fields(cls)):
            if name.endswith("_ids"):
                columns[name] = [row for part in parts for row in part[name][:]]
            else:
                columns[name] = np.concatenate([part.with_format("numpy")[name][:] for part in parts])
        return cls(**columns)  # type: ignore[arg-type]


def order_signs(pairs: TokenisedPairs, order: Order) -> np.ndarray:
    """The view that a loss trains on: +1 where y_w is the canonical first response, -1 where swapped.

    ``helpfulness``: y_w is the more helpful response (BFPO).  ``safety``: the safer one.  ``stream``:
    the more helpful one in the helpfulness stream, the safer one in the safety stream (the paper's
    DPO and IPO).  float32 (n,); 0 where the label that the order needs is missing.
    """
    helpful = pairs.ordered.astype(np.float32)
    safer = pairs.safer.astype(np.float32)
    views = {
        "helpfulness": helpful,
        "safety": safer,
        "stream": np.where(pairs.stream == SAFETY_STREAM, safer, helpful),
    }
    return views[order].astype(np.float32)
