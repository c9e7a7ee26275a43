"""Drawing requests: reproducible random numbers, the mixes of requests, and evaluation sets.

Every row of every generated set has a random generator of its own, keyed by what the row is.  So a
smaller set is the beginning of a larger one, and a change of a share or of a noise rate changes
only the rows that it touches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from bfpo_exp.errors import UserError, unknown
from bfpo_exp.world.grammar import (
    HELDOUT_TEMPLATES,
    SPLITS,
    TRAIN_TEMPLATES,
    Request,
    Split,
    split_of,
)
from bfpo_exp.world.lexicon import (
    BAD_QUALIFIERS,
    BENIGN_ACTIONS,
    DUAL_USE_ACTIONS,
    GOOD_QUALIFIERS,
    OBJECTS,
)

Kind = Literal["benign", "borderline", "harmful"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# The four cells of (action, qualifier).
Cell = Literal["plain", "dual_use_good", "benign_bad", "harmful"]
_CELLS: dict[Cell, tuple[Mapping[str, object], tuple[str, ...]]] = {
    "plain": (BENIGN_ACTIONS, GOOD_QUALIFIERS),
    "dual_use_good": (DUAL_USE_ACTIONS, GOOD_QUALIFIERS),
    "benign_bad": (BENIGN_ACTIONS, BAD_QUALIFIERS),
    "harmful": (DUAL_USE_ACTIONS, BAD_QUALIFIERS),
}

Mix = Mapping[Cell, float]
HARMFUL: Mix = {"harmful": 1.0}
BENIGN_TRAFFIC: Mix = {"plain": 0.60, "dual_use_good": 0.25, "benign_bad": 0.15}
# Against as many harmful requests, the action alone (or the qualifier alone) is right 80 % of the time.
BENIGN_QUESTIONS: Mix = {"plain": 0.2, "dual_use_good": 0.4, "benign_bad": 0.4}
_KIND_MIXES: dict[Kind, Mix] = {
    "benign": {"plain": 1.0},
    "borderline": {"dual_use_good": 0.5, "benign_bad": 0.5},
    "harmful": HARMFUL,
}

_COMBINATIONS: dict[tuple[Split, Cell], list[tuple[str, str]]] = {
    (split, cell): [
        (action, object_) for action in actions for object_ in OBJECTS if split_of(action, object_) == split
    ]
    for split in SPLITS
    for cell, (actions, _) in _CELLS.items()
}


def keyed_random(*key: object) -> random.Random:
    """A generator that is a function of its key: the same in every process, on every machine."""
    return random.Random("/".join(str(part) for part in key))


def draw_request(
    rng: random.Random, split: Split, mix: Mix, templates: Sequence[int] = TRAIN_TEMPLATES
) -> Request:
    """One request: cell by the weights of ``mix``, then combination, qualifier and template."""
    (cell,) = rng.choices(list(mix), list(mix.values()))
    action, object_ = rng.choice(_COMBINATIONS[split, cell])
    return Request(action, object_, rng.choice(_CELLS[cell][1]), rng.choice(templates))


def draw_distinct(
    rng: random.Random, size: int, split: Split, mix: Mix, templates: Sequence[int] = TRAIN_TEMPLATES
) -> list[Request]:
    """``size`` requests, no two alike; `UserError` where the grammar has fewer."""
    exist = sum(len(_COMBINATIONS[split, cell]) * len(_CELLS[cell][1]) for cell in mix) * len(templates)
    if size > exist:
        raise UserError(
            f"{size} requests asked for, but the {split} split has {exist} distinct ones of this kind"
        )
    drawn: dict[Request, None] = {}
    while len(drawn) < size:
        drawn[draw_request(rng, split, mix, templates)] = None
    return list(drawn)


def requests(split: Split, kind: Kind, size: int, seed: int, heldout_template: bool = False) -> list[Request]:
    """``size`` distinct requests of one kind, for evaluation.

    ``benign`` excludes borderline requests.  With ``heldout_template`` all are phrased in templates
    that training never sees, otherwise all in training's.  Raises `UserError` for an unknown split
    or kind, or a size beyond the number of distinct requests.
    """
    check_split(split)
    if kind not in KINDS:
        raise unknown("kind of request", kind, KINDS)
    check_size("size", size)
    rng = keyed_random("requests", split, kind, heldout_template, seed)
    templates = HELDOUT_TEMPLATES if heldout_template else TRAIN_TEMPLATES
    return draw_distinct(rng, size, split, _KIND_MIXES[kind], templates)


def check_split(split: str) -> None:
    """`UserError` unless ``split`` is one of `SPLITS`."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)


def check_size(name: str, value: int) -> None:
    """`UserError` unless ``value`` is a number of rows."""
    if value < 0:
        raise UserError(f"{name}={value}; a number of rows is not negative")


def check_share(name: str, value: float) -> None:
    """`UserError` unless ``value`` lies in [0, 1]."""
    if math.isnan(value) or not 0 <= value <= 1:
        raise UserError(f"{name}={value}; a share lies in [0, 1]")
