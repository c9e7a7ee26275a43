"""The learning curves of the bandit, as in the paper's Figure 5, with the closed form on top of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bfpo_exp.bandit.problem import describe, ranking_text
from bfpo_exp.bandit.results import BanditResult
from bfpo_exp.compare.figures import PALETTE, figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL, AROUND = (2.6, 2.0), (0.6, 1.0)  # inches: a panel, and what stands around all of them
LEGEND = 6.4  # inches that the legend takes
CLOSED_FORM: dict[str, Any] = {"color": "#222222", "linewidth": 0.7, "linestyle": (0, (4, 3))}


def learning_curves(result: BanditResult, path: Path) -> Path:
    """Draw pi(y_i) over the steps: a row a method, a column a tau, at the grid's first alpha and b1.

    ``path`` ends in .png or .svg.  A panel's title says the final ranking of most repeats, and ✓
    if all repeats end in the wanted one.  Colours come again after the seventh action.
    """
    from matplotlib.lines import Line2D

    settings = result.settings
    shown = [
        row
        for row, point in enumerate(settings.points)
        if point.alpha in (None, settings.alphas[0]) and point.b1 in (None, settings.b1s[0])
    ]
    rows, columns = len(settings.methods), len(settings.taus)
    width = max(PANEL[0] * columns + AROUND[0], LEGEND)
    with figure(width, PANEL[1] * rows + AROUND[1]) as drawn:
        grid = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes, row in zip(grid.flat, shown, strict=True):
            _panel(axes, result, row)
        grid[0, 0].set_xlim(0, settings.steps)
        highest = max(result.log_pi[:, shown].max(), result.optimum[shown].nan_to_num(-torch.inf).max())
        grid[0, 0].set_ylim(0, 1.04 * math.exp(highest))
        drawn.supxlabel("optimisation step", fontsize=9)
        drawn.supylabel("π(y)", fontsize=9)
        actions = [describe(a, settings.safe, settings.helpfulness) for a in settings.helpfulness]
        closed_form = Line2D([], [], **CLOSED_FORM)
        drawn.legend(
            [*grid[0, 0].get_lines()[: len(actions)], closed_form],
            [*actions, "closed form (DPO has none)"],
            title=f"wanted: {ranking_text(settings.wanted)};  mean and range of {settings.repeats} repeats",
            title_fontsize=8.5,
            fontsize=8.5,
            alignment="left",
            loc="outside upper left",
            ncols=3 if columns > 2 else 2,
        )
        return save(drawn, path)


def _panel(axes: Axes, result: BanditResult, row: int) -> None:
    settings = result.settings
    pi, optimum = result.log_pi[:, row].exp(), result.optimum[row].exp()
    for action in settings.helpfulness:
        of_action, color = pi[..., action - 1], PALETTE[(action - 1) % len(PALETTE)]
        axes.plot(result.steps, of_action.mean(-1), color=color, linewidth=1.6)
        axes.fill_between(
            result.steps, of_action.amin(-1), of_action.amax(-1), color=color, alpha=0.25, linewidth=0
        )
    for p in optimum[~optimum.isnan()].tolist():
        axes.axhline(p, **CLOSED_FORM)
    point, mark = settings.points[row], "✓" if result.recovered[-1, row].all() else "✗"
    title = f"{point.method.upper()}, τ = {point.tau:g}\n{result.final_ranking(row)} {mark}"
    axes.set_title(title, fontsize=9.5)
