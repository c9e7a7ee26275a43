"""How one run trained: loss, margin, accuracy, and rewards."""

from __future__ import annotations

from pathlib import Path

from bfpo_exp.compare.figures import PALETTE, figure, save
from bfpo_exp.tracking.metrics_file import MetricsFile

PANELS = {
    "loss": ("train/loss",),
    "margin h (nats)": ("train/margin",),
    "accuracy": ("train/accuracy",),
    "implicit reward": ("train/reward_safe", "train/reward_unsafe"),
    "rewards of own samples": ("train/reward_helpfulness", "train/reward_safety"),
    "multiplier and cost": ("train/multiplier", "train/cost"),
}


def training_curves(metrics: MetricsFile, path: Path, title: str = "") -> Path | None:
    """Draw a run's training metrics over steps; None where it has none of them."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for entry in metrics.read():
        for name, value in entry.metrics.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(entry.step)
            values.append(value)
    panels = {panel: found for panel, names in PANELS.items() if (found := [n for n in names if n in curves])}
    if not panels:
        return None
    with figure(7.2, 2.3 * ((len(panels) + 1) // 2)) as drawn:
        grid = drawn.subplots((len(panels) + 1) // 2, 2, squeeze=False, sharex=True).flat
        for axes, (panel, names) in zip(grid, panels.items(), strict=False):
            for color, name in zip(PALETTE, names, strict=False):
                axes.plot(*curves[name], color=color, linewidth=1.3, label=name.rpartition("_")[2])
            axes.set_title(panel, fontsize=9.5)
            if len(names) > 1:
                axes.legend(fontsize=8)
        drawn.suptitle(title, x=0.01, ha="left", fontsize=10.5)
        drawn.supxlabel("optimisation step", fontsize=9)
        return save(drawn, path)
