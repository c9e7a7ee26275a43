"""A quiet MLflow client that does not wait long for a dead server."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bfpo_exp.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's own defaults wait four minutes for a dead server and send usage statistics home.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def quieten() -> None:
    """Set `ENVIRONMENT`, where the user has set nothing; silence notices of migrations and retries."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def connect(uri: str) -> MlflowClient:
    """A client of the store at ``uri``; it opens no connection before its first call."""
    quieten()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn a failure of MLflow into a `UserError` of one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise UserError(f"cannot read {uri}: {in_one_line(error)}") from None


def in_one_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says, less the errors quoted in it."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first.partition(' with exception ')[0]}"


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the experiment ``name``; a `UserError` where there is none in use."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise UserError(f"no experiment {name!r} in {client.tracking_uri}; nothing was recorded there yet")
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"the experiment {name!r} was deleted in MLflow; run `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}` or choose another tracking.experiment"
        )
    return str(experiment.experiment_id)
