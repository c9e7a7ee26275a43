"""A sweep's own MLflow run, the parent of its runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from bfpo_exp.errors import UserError
from bfpo_exp.tracking.client import connect, in_one_line
from bfpo_exp.tracking.params import flatten
from bfpo_exp.tracking.publication import Publication
from bfpo_exp.tracking.recorder import PUBLICATION
from bfpo_exp.tracking.runs import KIND, open_run

PARENT_FILE = "mlflow_parent.json"
_log = logging.getLogger(__name__)


def open_parent(
    uri: str,
    experiment: str,
    sweep_name: str,
    sweep_dir: Path | str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> str:
    """The run id of the sweep in ``sweep_dir``: created the first time, reopened after that.

    ``params`` may be nested.  Raises `UserError` where the store fails, before any run starts.
    """
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    publication = Publication.load(Path(sweep_dir) / PARENT_FILE, uri)
    try:
        return open_run(client, publication, experiment, sweep_name, flatten(params), {**tags, KIND: "sweep"})
    except MlflowException as error:
        raise UserError(f"cannot record the sweep {sweep_name!r} to {uri}: {in_one_line(error)}") from None


def has_child(uri: str, parent_id: str, run_dir: Path) -> bool:
    """Whether MLflow was sent the whole of a finished run as a child of this sweep; the folder knows."""
    sent = Publication.load(run_dir / PUBLICATION, uri)
    if sent.parent_id != parent_id:
        sent = Publication.load(run_dir / f"mlflow-{parent_id}.json", uri)
    metrics = run_dir / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    return sent.status == "FINISHED" and sent.offset == size


def finish_parent(
    uri: str,
    run_id: str,
    artifacts: Iterable[Path],
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED",
) -> None:
    """Attach files (tables, plots) to a sweep's run and end it; a failure is only a warning."""
    client = connect(uri)
    try:
        for path in artifacts:
            client.log_artifact(run_id, str(path))
        client.set_terminated(run_id, status)
    except Exception as error:  # the files stay where they are; nothing is lost
        _log.warning("cannot attach the sweep's report in %s: %s", uri, in_one_line(error))
