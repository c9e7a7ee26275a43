"""Helpfulness against harmlessness, and the settings that no other setting beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo_exp.compare.figures import GREY, LIGHT, MARKERS, PALETTE, figure, save
from bfpo_exp.compare.labels import Label, place_labels
from bfpo_exp.compare.settings import MISSING, number
from bfpo_exp.compare.table import GEN, HELPFULNESS, LOWER_IS_BETTER, Cell, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    HELPFULNESS: "helpfulness",
    "eval/savg": "harmlessness, mean of disc. and gen.",
    GEN: "harmlessness: safe responses",
    "eval/disc": "discriminative harmlessness",
}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other point beats in both coordinates (more is better), by rising x.

    A point is beaten by one that is at least as good in both and better in one.

    >>> pareto_front([(1.0, 5.0), (2.0, 4.0), (2.0, 3.0), (0.5, 4.5), (3.0, 1.0)])
    [0, 1, 4]
    """

    def beaten(p: tuple[float, float]) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    return sorted((i for i, p in enumerate(points) if not beaten(p)), key=lambda i: (points[i], i))


@dataclass(frozen=True)
class Point:
    """One setting in the plot."""

    x: Cell
    y: Cell
    group: str  # what colour and marker show; empty where all settings are one group
    note: str  # what is written beside the point
    order: float  # its place on its group's line


def plot_pareto(
    comparison: Comparison, files: Sequence[Path], y: str = GEN, x: str = HELPFULNESS
) -> list[Path]:
    """Draw every setting that has both metrics into each of ``files`` (.png, .svg).

    Bars show one sample standard deviation over seeds.  A numeric sweep shows as lines: points
    that differ in the param of most values only are joined and annotated with it.  Gives the files
    written: none where no setting has both metrics.
    """
    points, along = _points(comparison, x, y)
    if not points:
        return []
    groups = list(dict.fromkeys(point.group for point in points))
    with figure(6.8, 4.8) as drawn:
        axes = drawn.add_subplot()
        axes.margins(0.12)
        _draw_front(axes, points, x, y)
        for i, group in enumerate(groups):
            _draw_group(axes, [p for p in points if p.group == group], i, joined=along is not None)
        if along and len(groups) > 1:
            axes.legend(
                title=f"numbers: {along}",
                fontsize=8,
                title_fontsize=8,
                loc="upper left",
                bbox_to_anchor=(1.0, 1.0),
            )
        axes.set_title(comparison.title)
        axes.set_xlabel(_axis(x))
        axes.set_ylabel(_axis(y))
        drawn.supxlabel(
            _key(points, along or _searched(comparison)), fontsize=7.5, color=GREY, x=0.01, ha="left"
        )
        place_labels(axes, [_label(p, groups.index(p.group), along) for p in points])
        return [save(drawn, path) for path in files]


def _points(comparison: Comparison, x: str, y: str) -> tuple[list[Point], str | None]:
    """The plot's points, and the name of the param along which they are joined, if any."""
    along = _along(comparison)
    points = []
    for place, row in enumerate(comparison.rows):
        cell_x, cell_y = row.cells.get(x), row.cells.get(y)
        if cell_x is None or cell_y is None or not math.isfinite(cell_x.mean + cell_y.mean):
            continue
        if along is None:
            words = [value for value in row.values if number(value) is None and value != MISSING]
            points.append(Point(cell_x, cell_y, words[0] if words else "", row.label, place))
            continue
        rest = [
            f"{value}" if number(value) is None else f"{name} {value}"
            for i, (name, value) in enumerate(zip(comparison.names, row.values, strict=True))
            if i != along and value != MISSING
        ]
        here = number(row.values[along])
        note = "" if here is None else row.values[along]
        points.append(Point(cell_x, cell_y, ", ".join(rest), note, place if here is None else here))
    if along is None and _searched(comparison):  # too many points to name them all
        front = _front(points, x, y)
        points = [p if i in front else replace(p, note="") for i, p in enumerate(points)]
    return points, None if along is None else comparison.names[along]


def _searched(comparison: Comparison) -> str:
    """What the names of a search's points are made of: its params, if any is a number; else nothing."""
    numeric = any(number(value) is not None for row in comparison.rows for value in row.values)
    return ", ".join(comparison.names) if numeric else ""


def _front(points: Sequence[Point], x: str, y: str) -> list[int]:
    """The points on the Pareto front, by rising x."""
    sign_x, sign_y = (-1 if metric in LOWER_IS_BETTER else 1 for metric in (x, y))
    return pareto_front([(sign_x * p.x.mean, sign_y * p.y.mean) for p in points])


def _along(comparison: Comparison) -> int | None:
    """The number of the numeric identifying param with most values, if any settings differ in it alone."""
    counts = {}
    rows = [row.values for row in comparison.rows if row.values]
    for i in range(len(comparison.names)):
        values = {row[i] for row in rows} - {MISSING}
        joins = len({row[:i] + row[i + 1 :] for row in rows}) < len(rows)
        if joins and len(values) > 1 and all(number(value) is not None for value in values):
            counts[i] = len(values)
    return max(counts, key=lambda i: counts[i]) if counts else None


def _draw_group(axes: Axes, group: Sequence[Point], number: int, joined: bool) -> None:
    group = sorted(group, key=lambda p: p.order)
    color, marker = _look(number)
    x, y = [p.x.mean for p in group], [p.y.mean for p in group]
    axes.errorbar(
        x,
        y,
        xerr=[p.x.sd or 0.0 for p in group],
        yerr=[p.y.sd or 0.0 for p in group],
        fmt="none",
        ecolor=color,
        elinewidth=1.0,
        alpha=0.45,
        zorder=3,
    )
    axes.plot(
        x,
        y,
        color=color,
        marker=marker,
        linestyle="-" if joined else "none",
        linewidth=1.2,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=4,
        label=group[0].group,
    )


def _draw_front(axes: Axes, points: Sequence[Point], x: str, y: str) -> None:
    means = [(points[i].x.mean, points[i].y.mean) for i in _front(points, x, y)]
    axes.plot(*zip(*means, strict=True), color=LIGHT, linewidth=6, solid_capstyle="round", zorder=2)


def _label(point: Point, number: int, along: str | None) -> Label:
    """A point's text, black, or in its line's colour where the same text stands on several lines."""
    color = "black" if along is None else _look(number)[0]
    return Label(point.note, point.x.mean, point.y.mean, point.x.sd or 0.0, point.y.sd or 0.0, color)


def _look(number: int) -> tuple[str, str]:
    return PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]


def _axis(metric: str) -> str:
    title = TITLES.get(metric, metric.removeprefix("eval/").replace("_", " "))
    return f"{title} (%), " + ("← better" if metric in LOWER_IS_BETTER else "better →")


def _key(points: Sequence[Point], along: str) -> str:
    counts = sorted({min(p.x.n, p.y.n) for p in points})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    parts = [
        "grey band: Pareto front",
        f"numbers: {along}" if along else "",
        "one run a setting, no spread"
        if counts == [1]
        else f"bars: sample standard deviation over seeds, n = {n}",
    ]
    return "; ".join(filter(None, parts))
