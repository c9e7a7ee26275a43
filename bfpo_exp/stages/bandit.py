"""The paper's bandit as a stage: a run like any other, without data or model."""

from __future__ import annotations

from pathlib import Path

from bfpo_exp.bandit.settings import BanditSettings
from bfpo_exp.config.schema import Config
from bfpo_exp.stages.context import Context

CSV, FIGURE = "bandit.csv", "bandit.png"


def bandit_settings(config: Config) -> BanditSettings:
    """The run's grid; a `UserError` for a value that is not allowed."""
    given = config.bandit
    assert given is not None
    return BanditSettings(
        methods=given.methods, taus=given.taus, alphas=given.alphas, b1s=given.b1s, safe=given.safe,
        helpfulness=given.helpfulness, steps=given.steps, batch=given.batch, repeats=given.repeats,
        lr=given.lr, seed=config.seed,
    )  # fmt: skip


def bandit_warnings(settings: BanditSettings) -> list[str]:
    """For each setting whose optimum is not the wanted ranking, in words, and why if the label tells."""
    from bfpo_exp.bandit.optimum import optimum
    from bfpo_exp.bandit.problem import ranking_of, ranking_text
    from bfpo_exp.losses import order_broken

    wanted = ranking_text(settings.wanted)
    found: dict[str, None] = {}  # an ordered set: settings that differ in tau alone say the same
    for point in settings.points:
        if point.alpha is None or point.b1 is None:
            continue
        best = optimum(settings, point)
        assert best is not None
        if (ranking := ranking_of(best.tolist())) != wanted:
            what = f"at alpha={point.alpha:g}, b1={point.b1:g} the optimum is {ranking}, not {wanted}"
            why = order_broken(point.b1, point.alpha) or "alpha is too far from 1/2 (docs/theory.md)"
            found[f"bandit: {what}: {why}"] = None
    return list(found)


def bandit(context: Context, run_dir: Path) -> str:
    """Train the grid; CSV and figure go into the run's folder; returns a line for each setting."""
    from bfpo_exp.bandit.figure import learning_curves
    from bfpo_exp.bandit.train import run_bandit

    result = run_bandit(bandit_settings(context.config))
    for step, values in result.metrics():
        context.metrics.append(step, values)
    (run_dir / CSV).write_text(result.csv())
    (run_dir / "artifacts" / CSV).write_text(result.csv())  # artifacts are what MLflow shows
    learning_curves(result, run_dir / "artifacts" / FIGURE)
    return "\n".join(result.lines())
