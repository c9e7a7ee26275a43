"""What a search is over: overrides with open values, in Hydra's own syntax.

    loss=choice(bfpo,dpo)  loss.order=helpfulness,safety  loss.alpha=interval(0,1)
    loss.beta=tag(log,interval(0.05,1))  train.steps=range(60,121,20)  train.batch=int(interval(4,16))

As elsewhere in Hydra a range does not hold its end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from bfpo_exp.config.check import checked
from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError, unknown
from bfpo_exp.hashing import stable_hash

Params = Mapping[str, Any]  # a value for each dimension
Distribution = CategoricalDistribution | FloatDistribution | IntDistribution


@dataclass(frozen=True)
class Dimension:
    """One override with an open value."""

    key: str
    line: str  # as it was given
    distribution: Distribution
    values: Sequence[Any] | None  # all of them; None for an interval of real numbers
    chooses_a_file: bool

    @property
    def corners(self) -> Sequence[Any]:
        """Every choice, or the ends of an interval or range."""
        d = self.distribution
        return d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high)

    def override(self, params: Params) -> str:
        """The override that gives it its value."""
        return f"{self.key}={params[self.key]}"


class Space:
    """The dimensions, and the overrides that are the same in each job.

    A value that the chosen files do not know (``loss.alpha`` with ``loss=dpo``) is left out of a job.
    """

    def __init__(self, lines: Sequence[str], loader: ConfigLoader, master: DictConfig) -> None:
        self._load = lambda overrides: loader.load_sweep_config(master, [*overrides])
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*lines])
        overrides = {override.get_key_element(): override for override in parsed}.values()  # the later wins
        self.fixed = [str(o.input_line) for o in overrides if not o.is_sweep_override()]
        self.dimensions = [
            _dimension(o, bool(loader.get_group_options(o.key_or_group)))
            for o in overrides
            if o.is_sweep_override()
        ]
        if not self.dimensions:
            raise UserError(
                "the search space is empty; leave a value open, such as loss.alpha=interval(0,1) or "
                "loss=choice(bfpo,dpo)"
            )
        files = [dimension for dimension in self.dimensions if dimension.chooses_a_file]
        chosen = itertools.product(*([f"{d.key}={text}" for text in d.corners] for d in files))
        self._known = {choices: self._known_with(choices) for choices in chosen}

    def _known_with(self, choices: tuple[str, ...]) -> set[str]:
        """The keys of dimensions that a job with these files has; ``+key`` adds one to any job."""
        job = self._load([*self.fixed, *choices])
        return {d.key for d in self.dimensions if d.chooses_a_file or d.key[0] == "+" or _has(job, d.key)}

    def job(self, params: Params) -> list[str]:
        """The overrides of the job with these values."""
        here = self._known[tuple(d.override(params) for d in self.dimensions if d.chooses_a_file)]
        elsewhere = set().union(*self._known.values()) - here  # a key known nowhere is for Hydra to refuse
        return [*self.fixed, *(d.override(params) for d in self.dimensions if d.key not in elsewhere)]

    def points(self) -> list[dict[str, Any]]:
        """Every point of a finite space, once for each distinct job."""
        for dimension in self.dimensions:
            if dimension.values is None:
                raise UserError(
                    f"{dimension.line} has no end of values, and hydra.sweeper.sampler=grid tries them all; "
                    "allowed: choice(...), range(...), int(interval(...)), or another sampler"
                )
        keys = [dimension.key for dimension in self.dimensions]
        points = (
            dict(zip(keys, values, strict=True))
            for values in itertools.product(*(dimension.values or () for dimension in self.dimensions))
        )
        return list({tuple(self.job(point)): point for point in reversed([*points])}.values())[::-1]

    def corners(self) -> list[list[str]]:
        """Jobs that together try each choice, and both ends of each interval and range."""
        start = {d.key: d.corners[0] for d in self.dimensions}
        jobs = [self.job(start | {d.key: value}) for d in self.dimensions for value in d.corners]
        return [list(job) for job in dict.fromkeys(map(tuple, jobs))]

    def checked(self) -> list[Config]:
        """The configs of the corners; a `UserError` for one that is not allowed."""
        return [self._checked(job) for job in self.corners()]

    def _checked(self, overrides: list[str]) -> Config:
        job = self._load(overrides)
        try:
            return checked(OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"]))
        except UserError as error:
            raise UserError(f"{error} (in the search space, at {' '.join(overrides)})") from None

    def made_of(self) -> dict[str, str]:
        """What tells this space from others: what is searched, and the config of all else."""
        job = self._load(self.corners()[0])
        rest = OmegaConf.masked_copy(job, [str(key) for key in job if key not in ("hydra", "tracking")])
        return {
            "space": " ".join(sorted(f"{d.key}={d.distribution}" for d in self.dimensions)),
            "config": stable_hash(OmegaConf.to_container(rest, resolve=False)),
        }


def _has(job: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(job, parent) if parent else job
    return name in list(node) if isinstance(node, DictConfig) else node is not None


def _dimension(override: Override, chooses_a_file: bool) -> Dimension:
    line, value = str(override.input_line), override.value()
    tags: set[str] = getattr(value, "tags", set())
    if wrong := sorted(tags - {"log"}):
        raise unknown(f"tag in {line}", wrong[0], ["log"])
    if tags and not isinstance(value, IntervalSweep):
        raise UserError(f"{line}: the tag log is for intervals; allowed: such as tag(log,interval(0.05,1))")
    distribution: Distribution
    values: Sequence[Any] | None = None
    if isinstance(value, IntervalSweep):
        distribution = _interval(value, line)
        if isinstance(distribution, IntDistribution):
            values = range(distribution.low, distribution.high + 1)
    elif isinstance(value, RangeSweep):
        values = [tidy(number) for number in sorted(value.range())] if value.step else []
        distribution = _range(values, line)
    else:
        texts = map(Transformer.str, value.list) if isinstance(value, ChoiceSweep) else None  # else a glob
        values = [*dict.fromkeys(texts or override.sweep_string_iterator())]
        distribution = CategoricalDistribution(values)
    return Dimension(override.get_key_element(), line, distribution, values, chooses_a_file)


def _interval(given: IntervalSweep, line: str) -> FloatDistribution | IntDistribution:
    low, high, log = given.start, given.end, "log" in given.tags
    assert low is not None
    assert high is not None
    if not (low < high and math.isfinite(high - low)):
        raise UserError(f"{line} holds no numbers; allowed: interval(low,high), finite, with low < high")
    if log and low <= 0:
        raise UserError(f"{line} begins at {low:g}; allowed with the tag log: > 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def _range(numbers: Sequence[int | float], line: str) -> FloatDistribution | IntDistribution:
    if not numbers:
        raise UserError(f"{line} holds no numbers; allowed: range(start,stop,step), stop itself excluded")
    low, high = numbers[0], numbers[-1]
    step = tidy(numbers[1] - low) if len(numbers) > 1 else 1
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, step=int(step))
    return FloatDistribution(low, high, step=step)


def tidy(number: float, digits: int = 10) -> float:
    """The number with so many digits; a whole one as it is.

    >>> tidy(0.1 + 0.2), tidy(0.123456, 4), tidy(12)
    (0.3, 0.1235, 12)
    """
    return number if isinstance(number, int) else float(f"{number:.{digits}g}")
