"""What a sweep ends with: its table in three formats, and its Pareto plot in two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bfpo_exp.compare.collect import runs_of
from bfpo_exp.compare.pareto import plot_pareto
from bfpo_exp.compare.render import Grid, grid, to_csv, to_latex, to_markdown
from bfpo_exp.compare.table import GEN, HELPFULNESS, Comparison, compare
from bfpo_exp.errors import UserError
from bfpo_exp.tracking.client import connect, reading


def sweep_report(
    uri: str, experiment: str, parent_id: str, out_dir: Path | str
) -> tuple[Grid | str, list[Path]]:
    """The table to show at a sweep's end, and the files written into ``out_dir``.

    A store that cannot be read, a sweep without a finished run and one without scores each give a
    line that says so and no file; a sweep is not made to fail by its report.
    """
    client = connect(uri)
    try:
        with reading(uri):
            name = client.get_run(parent_id).info.run_name
            runs = runs_of(client, experiment, parent_id)
    except UserError as error:
        return f"No comparison yet: {error}; later: bfpo-compare {parent_id}", []
    comparison = compare(runs, f"Sweep {name}")
    if not any(row.n for row in comparison.rows):
        why = "; ".join(comparison.footnotes) or "it has no runs"
        return f"Sweep {name}: no run has finished, so there is nothing to compare ({why}).", []
    if not any(cell for row in comparison.rows for cell in row.cells.values()):
        return f"Sweep {name}: its runs were not scored, so there is no table of scores.", []
    files, plots = write_report(comparison, Path(out_dir))
    shown = grid(comparison)
    return shown if plots else replace(shown, notes=(*shown.notes, no_plot())), files + plots


def write_report(comparison: Comparison, out_dir: Path) -> tuple[list[Path], list[Path]]:
    """Write the tables and the plots; no plot where no setting has both metrics."""
    out_dir.mkdir(parents=True, exist_ok=True)
    shown = grid(comparison)
    texts = {"md": to_markdown(shown), "csv": to_csv(comparison), "tex": to_latex(shown)}
    tables = [out_dir / f"table.{suffix}" for suffix in texts]
    for path, text in zip(tables, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return tables, plot_pareto(comparison, [out_dir / "pareto.png", out_dir / "pareto.svg"])


def no_plot() -> str:
    """Why there is no plot."""
    return f"No Pareto plot: no setting has both {HELPFULNESS} and {GEN}."
