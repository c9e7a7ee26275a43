"""What is run on the bandit: the grid of settings, checked, with the paper's values as defaults."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from bfpo_exp.bandit.problem import wanted_ranking
from bfpo_exp.errors import UserError, unknown

METHODS = {"bfpo": True, "dpo": False, "ipo": False}  # whether alpha and b1 mean anything to the method


class Point(NamedTuple):
    """One setting of the grid; alpha and b1 are None for a method that has none."""

    method: str
    tau: float
    alpha: float | None
    b1: float | None


@dataclass(frozen=True)
class BanditSettings:
    """A problem of n actions and a grid over it; a `UserError` where a value is not allowed.

    ``methods`` of bfpo, dpo, ipo; each runs at every tau (> 0; the code's beta), bfpo also at every
    alpha (finite) and b1 (> 1).  ``safe`` holds n >= 2 labels of 0 or 1, ``helpfulness`` the action
    numbers 1 .. n, the most helpful first.  ``batch`` pairs are drawn a step, with replacement; None
    takes all pairs at every step, which is the exact gradient.  ``lr`` is Adam's.  Lists become
    tuples; no value of the grid may come twice.
    """

    methods: Sequence[str] = ("bfpo", "dpo", "ipo")
    taus: Sequence[float] = (0.1, 0.5, 1.0)
    alphas: Sequence[float] = (0.5,)
    b1s: Sequence[float] = (3.0,)
    safe: Sequence[int] = (1, 0, 1, 0)
    helpfulness: Sequence[int] = (1, 2, 3, 4)
    steps: int = 1800
    batch: int | None = 32
    repeats: int = 5
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("methods", "safe", "helpfulness"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("taus", "alphas", "b1s"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        for name in ("methods", "taus", "alphas", "b1s"):
            _filled_and_distinct(name, getattr(self, name))
        for method in self.methods:
            if method not in METHODS:
                raise unknown("bandit method", method, METHODS)
        _each("taus", self.taus, (math.isfinite(tau) and tau > 0 for tau in self.taus), "> 0")
        _each("alphas", self.alphas, map(math.isfinite, self.alphas), "finite")
        _each("b1s", self.b1s, (math.isfinite(b1) and b1 > 1 for b1 in self.b1s), "> 1")
        self._check_problem()
        for name, least in {"steps": 1, "batch": 1, "repeats": 1, "seed": 0}.items():
            value = getattr(self, name)
            if not (name == "batch" and value is None) and (not isinstance(value, int) or value < least):
                raise UserError(f"the bandit's {name} is {value}; allowed: a whole number >= {least}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"the bandit's lr is {self.lr}; allowed: > 0")

    def _check_problem(self) -> None:
        if (n := len(self.safe)) < 2:
            raise UserError(f"the bandit's safe has {n} labels; allowed: one label an action, at least 2")
        _each("safe", self.safe, (label in (0, 1) for label in self.safe), "0 (unsafe) or 1 (safe)")
        if sorted(self.helpfulness) != list(range(1, n + 1)):
            raise UserError(
                f"the bandit's helpfulness is {_text(self.helpfulness)}; allowed: each of the actions 1 to "
                f"{n} once, the most helpful first ({n} as safe has {n} labels)"
            )

    @property
    def points(self) -> tuple[Point, ...]:
        """The settings of the grid, those of a method together, in the order of the lists.

        >>> BanditSettings(methods=["dpo", "bfpo"], taus=[0.5], alphas=[0, 0.5]).points[1:]
        (Point(method='bfpo', tau=0.5, alpha=0.0, b1=3.0), Point(method='bfpo', tau=0.5, alpha=0.5, b1=3.0))
        """
        return tuple(
            Point(method, *values)
            for method in self.methods
            for values in product(
                self.taus,
                self.alphas if METHODS[method] else (None,),
                self.b1s if METHODS[method] else (None,),
            )
        )

    @property
    def wanted(self) -> list[int]:
        """The ranking that is wanted of the policy, best first."""
        return wanted_ranking(self.safe, self.helpfulness)


def _filled_and_distinct(name: str, values: Sequence[object]) -> None:
    if not values:
        raise UserError(f"the bandit's {name} is empty; give at least one value")
    if len(set(values)) < len(values):
        raise UserError(f"the bandit's {name} is {_text(values)}; allowed: each value once")


def _each(name: str, values: Sequence[object], allowed: Iterable[bool], what: str) -> None:
    for value, fine in zip(values, allowed, strict=True):
        if not fine:
            raise UserError(f"the bandit's {name} holds {value}; allowed: {what}")


def _text(values: Iterable[object]) -> str:
    return f"[{', '.join(map(str, values))}]"
