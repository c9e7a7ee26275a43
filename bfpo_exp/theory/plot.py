"""The figure of docs/theory.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bfpo_exp.compare.figures import GREY, MARKERS, PALETTE
from bfpo_exp.theory.measure import Measured, by_size, by_strength, order_by_shift
from bfpo_exp.theory.order import shift_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRENGTHS = (-0.95, -0.85, -0.7, -0.5, -0.35, -0.2, -0.1, 0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95)
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
TAUS = (1.0, 0.1, 0.01)
ALPHAS = tuple(i / 100 for i in range(-1, 102))
ORDER_SIZES = (4, 8, 16)


def draw_gap(drawn: Figure) -> None:
    """Measure and draw: the gap, its effect on the optimum, and the shifts that keep the order."""
    axes = drawn.subplots(2, 2)
    strengths, sizes = by_strength(STRENGTHS, TAUS), by_size(SIZES, TAUS)
    _draw_spread(axes[0, 0], strengths)
    _draw_distance(axes[0, 1], strengths, lambda m: m.correlation.median().item())
    axes[0, 1].set_title("(b) distance of the two optima")
    axes[0, 1].set_xlabel("correlation of helpfulness and safety")
    axes[0, 1].legend(title="median, 10 to 90 %", title_fontsize=8, fontsize=8, loc="upper center")
    for upper in axes[0]:
        upper.set_xlim(-1, 1)
    _draw_distance(axes[1, 0], sizes, lambda m: m.setting)
    axes[1, 0].set_xscale("log", base=2)
    axes[1, 0].set_xticks([2, 4, 8, 16, 32, 64, 128], labels=["2", "4", "8", "16", "32", "64", "128"])
    axes[1, 0].set_title("(c) the same, safety drawn independently")
    axes[1, 0].set_xlabel("number of responses n")
    _draw_order(axes[1, 1])


def _draw_spread(axes: Axes, measured: Sequence[Measured]) -> None:
    for m in measured:
        axes.plot(m.correlation, m.gap_spread, ".", color=PALETTE[0], markersize=2, alpha=0.12)
    middle = [(m.correlation.median(), m.gap_spread.median()) for m in measured]
    axes.plot(*zip(*middle, strict=True), color=PALETTE[-1], linewidth=1.2)
    axes.set_title("(a) the gap, one point a problem")
    axes.set_xlabel("correlation of helpfulness and safety")
    axes.set_ylabel(r"$\max\,\delta - \min\,\delta$")


def _draw_distance(axes: Axes, measured: Sequence[Measured], x: Callable[[Measured], float]) -> None:
    across = [x(m) for m in measured]
    for i, tau in enumerate(TAUS):
        values = torch.stack([m.by_tau[tau].total_variation for m in measured])
        low, middle, high = _quantiles(values)
        axes.fill_between(across, low, high, color=PALETTE[i], alpha=0.15, linewidth=0)
        axes.plot(
            across,
            middle,
            color=PALETTE[i],
            marker=MARKERS[i],
            markersize=4,
            linewidth=1.2,
            label=f"τ = {tau:g}",
        )
    axes.set_ylabel("TV(supervised, RL)")
    axes.set_ylim(bottom=0)


def _quantiles(values: Tensor) -> Tensor:
    return torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype), dim=-1)


def _draw_order(axes: Axes) -> None:
    for i, n in enumerate(ORDER_SIZES):
        shares = [100 * share for share in order_by_shift(ALPHAS, n)]
        axes.plot(ALPHAS, shares, color=PALETTE[i], linewidth=1.4, label=f"n = {n}")
        for end in shift_band(n):
            axes.plot([end, end], [97, 103], color=PALETTE[i], linewidth=1.4, clip_on=False)
    axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_title("(d) supervised optimum in the wanted order")
    axes.set_xlabel(r"shift $\alpha$")
    axes.set_ylabel("% of random problems")
    axes.set_ylim(0, 104)
    axes.legend(fontsize=8, loc="upper left")
