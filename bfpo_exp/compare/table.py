"""The comparison itself: mean and spread over seeds of each setting's scores."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bfpo_exp.compare.collect import RunRow
from bfpo_exp.compare.settings import grouped, identifying, short_names
from bfpo_exp.errors import unknown
from bfpo_exp.tracking.runs import EXACT, FAILURE, REWARDS

HELPFULNESS = "eval/helpfulness"
GEN = "eval/gen"
DEFAULT_METRICS = (HELPFULNESS, "eval/disc", GEN, "eval/savg", "eval/over_refusal", "eval/malformed")
LOWER_IS_BETTER = frozenset({"eval/over_refusal", "eval/malformed"})
REASONS_SHOWN = 3


@dataclass(frozen=True)
class Cell:
    """One metric of one setting, in the metric's own unit (percent for all of ``eval/``)."""

    mean: float
    sd: float | None  # sample standard deviation (n - 1); None for a single run or an infinite mean
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell | None:
        """Mean and spread of the values that are not NaN; None where there is none.

        >>> Cell.of([60.0, 62.0, 64.0])
        Cell(mean=62.0, sd=2.0, n=3)
        """
        real = [value for value in values if not math.isnan(value)]
        if not real:
            return None
        mean = sum(real) / len(real)
        has_spread = len(real) > 1 and math.isfinite(mean)
        return cls(mean, statistics.stdev(real) if has_spread else None, len(real))


@dataclass(frozen=True)
class Row:
    """One setting: its identifying values, its scores, how many runs finished."""

    values: tuple[str, ...]
    cells: dict[str, Cell | None]
    n: int

    @property
    def label(self) -> str:
        """The setting in a few words, for plots."""
        return ", ".join(self.values) or "all runs"


@dataclass(frozen=True)
class Comparison:
    """Settings by metrics."""

    title: str
    caption: str
    names: tuple[str, ...]  # the columns that identify a setting
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...]

    def best(self, metric: str) -> set[int]:
        """The rows whose mean is best, to the one decimal that is shown; none of a single row."""
        means = {i: round(c.mean, 1) for i, row in enumerate(self.rows) if (c := row.cells[metric])}
        if len(self.rows) < 2 or not means:
            return set()
        pick = min if metric in LOWER_IS_BETTER else max
        return {i for i, mean in means.items() if mean == pick(means.values())}


def compare(
    runs: Sequence[RunRow],
    title: str,
    metrics: Sequence[str] = DEFAULT_METRICS,
    sort: str | None = None,
) -> Comparison:
    """Group runs into settings and average each metric over the finished ones.

    The caption says which seeds vary between the runs and which they share.  With ``sort`` the best
    setting by that metric comes first.  Raises `UserError` for a ``sort`` that no run has.
    """
    params = [run.params for run in runs]
    names = identifying(params)
    finished = [run.status == "FINISHED" for run in runs]
    shown = list(dict.fromkeys([*metrics, *([sort] if sort else [])]))
    rows, exact = [], []
    for values, numbers in grouped(params, names).items():
        done = [runs[i] for i in numbers if finished[i]]
        cells = {m: Cell.of([run.metrics[m] for run in done if m in run.metrics]) for m in shown}
        rows.append(Row(values, cells, len(done)))
        if any(runs[i].tags.get(REWARDS) == EXACT for i in numbers):
            exact.append(rows[-1].label)
    if sort:
        rows = _sorted(rows, sort, {m for run in runs for m in run.metrics})
    return Comparison(
        title=title,
        caption=" ".join(filter(None, [_spread(rows), _seeds(params)])),
        names=tuple(short_names(names)),
        metrics=tuple(shown),
        rows=tuple(rows),
        footnotes=(*_upper_bounds(exact), *_unfinished(runs)),
    )


def _upper_bounds(labels: Sequence[str]) -> list[str]:
    """Which settings were trained on rewards that no reward model can match."""
    told = "trained on the exact rewards of the generated world's judge, an upper bound"
    return [f"{told}: {', '.join(labels)}"] if labels else []


def _sorted(rows: list[Row], metric: str, known: set[str]) -> list[Row]:
    if metric not in known:
        raise unknown("metric", metric, known)
    sign = 1 if metric in LOWER_IS_BETTER else -1
    return sorted(rows, key=lambda row: sign * c.mean if (c := row.cells[metric]) else math.inf)


def _spread(rows: Sequence[Row]) -> str:
    counts = sorted({row.n for row in rows if row.n})
    if not counts:
        return ""
    if counts == [1]:
        return "In percent; one run a setting, so no spread is known."
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"In percent; mean ± sample standard deviation over seeds, n = {n}."


def _seeds(params: Sequence[Mapping[str, str]]) -> str:
    """What is random anew in each run, and what the runs have in common."""
    values: dict[str, set[str]] = {}
    for run in params:
        for name, value in run.items():
            if name == "seed" or name.endswith(".seed"):
                values.setdefault(name, set()).add(value)
    varying = sorted(name for name, found in values.items() if len(found) > 1)
    shared = sorted(set(values) - set(varying))
    if not varying:
        return ""
    rest = f"; shared by all runs: {', '.join(shared)}" if shared else ""
    return f"Seeds that vary: {', '.join(varying)}{rest}."


def _unfinished(runs: Sequence[RunRow]) -> list[str]:
    """A line for each way in which runs did not finish, with the most frequent reasons."""
    notes = []
    for status, how in (("FAILED", "failed"), ("KILLED", "were killed"), ("RUNNING", "have not finished")):
        these = [run for run in runs if run.status == status]
        reasons = Counter(run.tags[FAILURE] for run in these if FAILURE in run.tags)
        if these:
            why = "; ".join(f"{reason} ({n}x)" for reason, n in reasons.most_common(REASONS_SHOWN))
            notes.append(f"{len(these)} of {len(runs)} runs {how}" + (f": {why}" if why else ""))
    return notes
