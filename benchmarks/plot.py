"""The plot of the step benchmark: speed and memory by profile, TRL beside ours."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bfpo_exp.compare.figures import PALETTE, figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Bar = tuple[str, str]  # a side and its reference
BARS: dict[Bar, tuple[str, str]] = {  # label and colour
    ("ours", "cached"): ("ours, reference ahead", PALETTE[0]),
    ("trl", "cached"): ("TRL, reference ahead", PALETTE[1]),
    ("ours", "live"): ("ours, live reference", PALETTE[5]),
    ("trl", "live"): ("TRL, live reference", PALETTE[4]),
}


def draw(section: dict[str, Any], path: Path) -> None:
    """A column of panels for each profile: pairs a second above, peak memory below."""
    rows = section["rows"]
    profiles = list(dict.fromkeys(row["profile"] for row in rows))
    with figure(3.4 * len(profiles), 5.6) as drawn:
        panels = drawn.subplots(2, len(profiles), squeeze=False)
        for column, profile in enumerate(profiles):
            of_profile = [row for row in rows if row["profile"] == profile]
            speed, memory = panels[:, column]
            speed.set_title(profile)
            _bars(speed, of_profile, {id(row): median(row["pairs_per_second"]) for row in of_profile})
            _bars(memory, of_profile, {id(row): row["peak_gb"] for row in of_profile})
        panels[0, 0].set_ylabel("pairs a second")
        panels[1, 0].set_ylabel("peak memory, GB")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(BARS))
        save(drawn, path)


def _bars(axes: Axes, rows: list[dict[str, Any]], heights: dict[int, float]) -> None:
    """A group of bars for each choice of trained weights."""
    groups = list(dict.fromkeys(row["trained"] for row in rows))
    width = 0.8 / len(BARS)
    for i, ((side, reference), (label, colour)) in enumerate(BARS.items()):
        of_bar = [row for row in rows if (row["side"], row["reference"]) == (side, reference)]
        places = [groups.index(row["trained"]) + (i - (len(BARS) - 1) / 2) * width for row in of_bar]
        made = axes.bar(places, [heights[id(row)] for row in of_bar], width, label=label, color=colour)
        axes.bar_label(made, fmt=lambda height: f"{height:.3g}", fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), [f"{name.removeprefix('mlp.')} trained" for name in groups])
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
