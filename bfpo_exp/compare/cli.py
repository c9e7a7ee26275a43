"""The command ``bfpo-compare``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo_exp.errors import UserError, unknown
from bfpo_exp.paths import home

if TYPE_CHECKING:
    from bfpo_exp.compare.collect import RunRow
    from bfpo_exp.compare.render import Grid
    from bfpo_exp.compare.table import Comparison

FORMATS = ("rich", "markdown", "csv", "latex")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison of a sweep; exit code 2 and one line for a bad input."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except UserError as error:
        print(f"bfpo-compare: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bfpo-compare", description="Tables and plots of a sweep: mean and spread over seeds."
    )
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="name or run id; default: the latest")
    parser.add_argument("--format", choices=FORMATS, default="rich")
    parser.add_argument("--published", metavar="TABLE", help="also the paper's table2, table3 or table4")
    parser.add_argument("--metrics", metavar="A,B", help="columns, such as eval/helpfulness,eval/gen")
    parser.add_argument("--sort", metavar="METRIC", help="best setting by this metric first")
    parser.add_argument("--output", metavar="DIR", type=Path, help="write tables and plots there, too")
    parser.add_argument(
        "--tracking",
        metavar="URI",
        default="sqlite",
        help="MLflow store; default: mlflow.db under the runs root",
    )
    return parser


def _run(arguments: argparse.Namespace) -> None:
    from bfpo_exp.compare.published import published

    beside = published(arguments.published) if arguments.published else []
    comparison = _comparison(arguments)
    _show(arguments.format, comparison, beside)
    if arguments.output:
        from bfpo_exp.compare.report import no_plot, write_report

        tables, plots = write_report(comparison, arguments.output)
        for path in tables + plots:
            print(path, file=sys.stderr)
        if not plots:
            print(no_plot(), file=sys.stderr)


def _comparison(arguments: argparse.Namespace) -> Comparison:
    from bfpo_exp.compare.table import DEFAULT_METRICS, compare
    from bfpo_exp.tracking.store import existing

    uri = existing(arguments.tracking, home())
    from bfpo_exp.compare.collect import find_sweep, runs_of
    from bfpo_exp.tracking.client import connect, reading

    client = connect(uri)
    with reading(uri):
        sweep = find_sweep(client, arguments.sweep)
        runs = runs_of(client, sweep.experiment, sweep.run_id)
    if not runs:
        raise UserError(f"the sweep {sweep.name!r} has no runs yet")
    metrics = _metrics(arguments.metrics, runs) if arguments.metrics else DEFAULT_METRICS
    sort = _metrics(arguments.sort, runs)[0] if arguments.sort else None
    return compare(runs, f"Sweep {sweep.name}", metrics, sort)


def _metrics(given: str, runs: Sequence[RunRow]) -> list[str]:
    """The named columns, each of which some run has; the prefix ``eval/`` may be left out."""
    known = {name for run in runs for name in run.metrics}
    names = [name if name in known else f"eval/{name}" for name in given.split(",")]
    for asked, name in zip(given.split(","), names, strict=True):
        if name not in known:
            raise unknown("metric", asked, known)
    return names


def _show(form: str, comparison: Comparison, beside: Sequence[Grid]) -> None:
    from bfpo_exp.compare import render

    ours = render.grid(comparison)
    if form == "rich":
        for part in (ours, *beside):
            render.show(part)
    elif form == "csv":
        print("\n".join([render.to_csv(comparison), *map(render.grid_to_csv, beside)]), end="")
    else:
        write = render.to_markdown if form == "markdown" else render.to_latex
        print("\n".join(write(part) for part in (ours, *beside)), end="")


if __name__ == "__main__":
    sys.exit(main())
