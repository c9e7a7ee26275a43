"""What comes out of the bandit: rankings, distances to the closed form, CSV, report lines, metrics."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bfpo_exp.bandit.optimum import optimum
from bfpo_exp.bandit.problem import TIE, ranking_of, ranking_text
from bfpo_exp.bandit.settings import BanditSettings, Point


@dataclass(frozen=True, eq=False)
class BanditResult:
    """The learning curves of all settings, and what is read off them.

    ``log_pi[k, s, r, i]`` is log pi(y_{i+1}) in nats, float64, after ``steps[k]`` optimisation steps (the
    first is 0, the last the end) of repeat r of ``settings.points[s]``.
    """

    settings: BanditSettings
    steps: tuple[int, ...]
    log_pi: Tensor

    @cached_property
    def recovered(self) -> Tensor:
        """Whether the ranking is the wanted one, without ties: bool of shape (records, settings, repeats)."""
        best_first = self.log_pi[..., torch.tensor(self.settings.wanted) - 1]
        return (best_first[..., :-1] - best_first[..., 1:] > TIE).all(-1)

    @cached_property
    def optimum(self) -> Tensor:
        """log pi of the closed form, in nats, of shape (settings, n); rows of NaN where there is none."""
        missing = torch.full(self.log_pi.shape[-1:], torch.nan, dtype=torch.float64)
        found = [optimum(self.settings, point) for point in self.settings.points]
        return torch.stack([missing if row is None else row for row in found])

    @cached_property
    def tv_to_optimum(self) -> Tensor:
        """Total variation, 0 to 1, from the closed form: shape (records, settings, repeats), or NaN."""
        return (self.log_pi.exp() - self.optimum.exp()[:, None]).abs().sum(-1) / 2

    def final_ranking(self, row: int) -> str:
        """The ranking that most repeats of ``settings.points[row]`` end in; how many, if not all do."""
        counts = Counter(ranking_of(log_pi.tolist()) for log_pi in self.log_pi[-1, row])
        ranking, most = counts.most_common(1)[0]
        total = self.settings.repeats
        return ranking if most == total else f"{ranking} ({most} of {total})"

    def csv(self) -> str:
        """One row per setting and repeat, at the end of training.

        Columns ``method,tau,alpha,b1,repeat,ranking,recovered,p1,...,pn``: repeats count from 1, recovered
        is 1 or 0, alpha and b1 are empty for a method that has none.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        probabilities = [f"p{action}" for action in range(1, len(self.settings.safe) + 1)]
        writer.writerow(["method", "tau", "alpha", "b1", "repeat", "ranking", "recovered", *probabilities])
        for row, point in enumerate(self.settings.points):
            for repeat, log_pi in enumerate(self.log_pi[-1, row]):
                recovered = int(self.recovered[-1, row, repeat])
                values = ["" if value is None else _number(value) for value in point[1:]]
                ranking = ranking_of(log_pi.tolist())
                writer.writerow(
                    [point.method, *values, repeat + 1, ranking, recovered, *log_pi.exp().tolist()]
                )
        return text.getvalue()

    def lines(self) -> list[str]:
        """One line a setting: its values, its final ranking, the wanted one, how many repeats got it."""
        wanted = ranking_text(self.settings.wanted)
        cells = []
        for row, point in enumerate(self.settings.points):
            cells.append(
                [
                    point.method,
                    *(f"{name} {_number(value)}" for name, value in self._values(point)),
                    self.final_ranking(row),
                    f"wanted {wanted}",
                    f"recovered {int(self.recovered[-1, row].sum())} of {self.settings.repeats}",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]

    def metrics(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The metrics of each recorded step, as (step, {name: value}), in the order of the steps.

        Under ``bandit/<method>/<values>/``: ``recovered``, percent of the repeats whose ranking is the
        wanted one; ``p1`` .. ``pn``, the mean over repeats of pi(y_i); ``tv_to_optimum``, the mean over
        repeats of the total variation from the closed form, where there is one.  ``<values>`` is such
        as ``tau_0.1_alpha_0.5``; alpha and b1 are named where the grid has more than one.
        """
        names = [self._name(point) for point in self.settings.points]
        recovered = self.recovered.double().mean(-1) * 100
        probabilities, distances = self.log_pi.exp().mean(-2), self.tv_to_optimum.mean(-1)
        for record, step in enumerate(self.steps):
            values: dict[str, float] = {}
            for row, name in enumerate(names):
                values[f"{name}/recovered"] = recovered[record, row].item()
                for action, p in enumerate(probabilities[record, row].tolist(), start=1):
                    values[f"{name}/p{action}"] = p
                if not distances[record, row].isnan():
                    values[f"{name}/tv_to_optimum"] = distances[record, row].item()
            yield step, values

    def _values(self, point: Point) -> list[tuple[str, float | None]]:
        """tau and alpha of a setting, and b1 where the grid has more than one."""
        values = list(zip(("tau", "alpha", "b1"), point[1:], strict=True))
        return values if len(self.settings.b1s) > 1 else values[:-1]

    def _name(self, point: Point) -> str:
        grids = {"tau": None, "alpha": self.settings.alphas, "b1": self.settings.b1s}
        values = [
            f"{name}_{_number(value)}"
            for (name, grid), value in zip(grids.items(), point[1:], strict=True)
            if value is not None and (grid is None or len(grid) > 1)
        ]
        return f"bandit/{point.method}/{'_'.join(values)}"


def _number(value: float | None) -> str:
    """The shortest text that tells the value from all others, without characters that MLflow refuses."""
    return "-" if value is None else repr(value).removesuffix(".0").replace("+", "")
