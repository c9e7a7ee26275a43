"""Reading a sweep and its runs out of MLflow."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfpo_exp.errors import UserError, unknown
from bfpo_exp.tracking.client import experiment_id
from bfpo_exp.tracking.runs import KIND, PARENT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 200  # runs a call
NAMES_SHOWN = 8
_LARGEST = 1.7976931348623157e308  # as which MLflow gives infinity back


@dataclass(frozen=True)
class RunRow:
    """One run of a sweep: what it was given and what it scored."""

    run_id: str
    name: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    started: int  # ms since the epoch
    params: dict[str, str]
    metrics: dict[str, float]  # the last value of each
    tags: dict[str, str]


@dataclass(frozen=True)
class Sweep:
    """A parent run."""

    run_id: str
    name: str
    experiment: str


def find_sweep(client: MlflowClient, given: str | None = None) -> Sweep:
    """The latest sweep, or the one whose name or run id is ``given`` (of equal names the latest).

    Raises `UserError` where there is none, with the nearest name.
    """
    experiments = {e.experiment_id: e.name for e in client.search_experiments()}
    sweeps = [
        Sweep(run.info.run_id, run.info.run_name or run.info.run_id, experiments[run.info.experiment_id])
        for run in _search(client, list(experiments), f"tags.`{KIND}` = 'sweep'")
    ]
    if not sweeps:
        raise UserError(
            f"no sweep is recorded in {client.tracking_uri}; run one first, such as "
            "`bfpo-exp -m method=dpo,ipo,bfpo seed=0,1,2`"
        )
    if given is None:
        return sweeps[0]
    for sweep in sweeps:
        if given in (sweep.name, sweep.run_id):
            return sweep
    names = list(dict.fromkeys(sweep.name for sweep in sweeps))
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    raise unknown("sweep", given, {*names[:NAMES_SHOWN], *near})


def runs_of(client: MlflowClient, experiment: str, parent_id: str) -> list[RunRow]:
    """The children of a sweep, first started first; of identical runs only one.

    Two runs with the same params are one experiment done twice (a retry, a reused result): the
    finished one stays, of several the latest.
    """
    found = _search(client, [experiment_id(client, experiment)], f"tags.`{PARENT}` = '{parent_id}'")
    distinct: dict[frozenset[tuple[str, str]], RunRow] = {}
    for row in sorted(map(_row, found), key=lambda row: (row.status == "FINISHED", row.started)):
        distinct[frozenset(row.params.items())] = row
    return sorted(distinct.values(), key=lambda row: (row.started, row.run_id))


def _search(client: MlflowClient, experiments: list[str], condition: str) -> list[Run]:
    """Every run that meets the condition, latest first, page by page."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            experiments,
            condition,
            max_results=PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _row(run: Run) -> RunRow:
    return RunRow(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        status=run.info.status,
        started=run.info.start_time,
        params=dict(run.data.params),
        metrics={name: _value(value) for name, value in run.data.metrics.items()},
        tags=dict(run.data.tags),
    )


def _value(stored: float) -> float:
    return math.copysign(math.inf, stored) if abs(stored) >= _LARGEST else stored
