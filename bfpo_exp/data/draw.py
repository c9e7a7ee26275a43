"""Which rows of a source are used: a seeded random subset, and one side of the held-out split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from bfpo_exp.data.records import Message


def wanted(size: int | float | None, usable: int) -> int:
    """How many rows a size asks for: itself, or its fraction of the usable rows, or all.

    >>> wanted(10, 500), wanted(0.5, 500), wanted(None, 500)
    (10, 250, 500)
    """
    if size is None:
        return usable
    return round(size * usable) if isinstance(size, float) else size


def draw_order(rows: np.ndarray, seed: int, source: str) -> np.ndarray:
    """The rows in the random order in which they are drawn.

    It depends on the seed and the source's own name, so another source beside it changes nothing.
    """
    name = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "little")
    return np.random.default_rng([seed, name]).permutation(rows)


def is_held_out(prompt: Sequence[Message], share: float, split: str = "") -> bool:
    """Whether a prompt belongs to the held-out side, which gets about this share of the prompts.

    It is decided by a hash of the first user turn, whitespace and case aside, and by nothing else:
    a prompt is on the same side in every source, run and seed, and so is every longer conversation
    that begins with it.  Splits of other names are independent of each other.
    """
    opening = next((turn["content"] for turn in prompt if turn["role"] == "user"), "")
    normal = (split + " ".join(opening.casefold().split())).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(normal).digest()[:8], "little") < share * 2**64
