"""The MLflow store: found, and made once, before any worker uses it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import urllib.request
from pathlib import Path

from bfpo_exp.config.schema import Tracking
from bfpo_exp.errors import UserError, unknown

HEALTH_TIMEOUT = 3.0  # seconds
_SQLITE = "sqlite:///"


def resolve(uri: str, root: Path) -> str:
    """The tracking URI that ``uri`` stands for; ``sqlite`` is ``mlflow.db`` under ``root``.

    Paths become absolute, so that a worker in another folder finds the same store.

    >>> resolve("sqlite", Path("/runs"))
    'sqlite:////runs/mlflow.db'
    >>> resolve("http://tracker:5000/", Path("/runs"))
    'http://tracker:5000'
    """
    if uri == "sqlite":
        return f"{_SQLITE}{Path(root).absolute() / 'mlflow.db'}"
    if uri.startswith(_SQLITE) and len(uri) > len(_SQLITE):
        return f"{_SQLITE}{database(uri)}"
    if uri.startswith(("http://", "https://")):
        return uri.rstrip("/")
    raise unknown("tracking.uri", uri, ["sqlite", "sqlite:///PATH", "http://HOST:PORT", "https://HOST"])


def database(uri: str) -> Path:
    """The absolute path of the file behind a ``sqlite:///`` URI."""
    return Path(uri.removeprefix(_SQLITE)).absolute()


def existing(uri: str, root: Path) -> str:
    """The tracking URI of a store to read; `UserError` where nothing was recorded yet."""
    resolved = resolve(uri, root)
    if not resolved.startswith(_SQLITE):
        _check_server(resolved)
    elif not database(resolved).is_file():
        raise UserError(
            f"nothing is recorded yet: there is no {database(resolved)}; run `bfpo-exp` first, or set "
            "BFPO_EXP_HOME to the runs root that you mean"
        )
    return resolved


def prepare(tracking: Tracking, root: Path) -> str:
    """Make the store and its experiment ready for any number of workers; give the tracking URI.

    Processes that create or migrate one SQLite file at the same time destroy it, so this is done
    under a file lock, once per MLflow version; afterwards a marker beside the file says so and
    MLflow is not even imported.  Raises `UserError` for a scheme that is not allowed, a server
    that does not answer, a store of another MLflow version, a deleted experiment.
    """
    uri = resolve(tracking.uri, root)
    if not uri.startswith(_SQLITE):
        _check_server(uri)
        _ensure_experiment(uri, tracking.experiment, artifacts=None)
        return uri
    from filelock import FileLock

    file = database(uri)
    marker = _Marker(file)
    if not marker.has(tracking.experiment):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not marker.has(tracking.experiment):
                artifacts = (Path(root).absolute() / "mlartifacts").as_uri()
                _ensure_experiment(uri, tracking.experiment, artifacts)
                marker.add(tracking.experiment)
    return uri


class _Marker:
    """A file beside the database: which MLflow version made it, which experiments it has."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._path = Path(f"{database}.ready")

    def has(self, experiment: str) -> bool:
        return experiment in self._experiments()

    def add(self, experiment: str) -> None:
        ready = {"mlflow": _mlflow_version(), "experiments": [*self._experiments(), experiment]}
        draft = Path(f"{self._path}.draft")
        draft.write_text(json.dumps(ready))
        os.replace(draft, self._path)

    def _experiments(self) -> list[str]:
        if not (self._database.exists() and self._path.exists()):
            return []
        ready = json.loads(self._path.read_text())
        return list(ready["experiments"]) if ready["mlflow"] == _mlflow_version() else []


def _mlflow_version() -> str:
    return importlib.metadata.version("mlflow")


def _check_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=HEALTH_TIMEOUT):
            pass
    except OSError as error:  # URLError, HTTPError and timeouts are all of this kind
        raise UserError(
            f"no MLflow server answers at {uri} ({getattr(error, 'reason', error)}); start one with "
            "`mlflow server`, or record to a local file with tracking.uri=sqlite"
        ) from None


def _ensure_experiment(uri: str, name: str, artifacts: str | None) -> None:
    from bfpo_exp.tracking.client import connect, experiment_id, in_one_line

    client = connect(uri)
    from mlflow.exceptions import MlflowException

    try:
        if client.get_experiment_by_name(name) is None:
            client.create_experiment(name, artifact_location=artifacts)
    except MlflowException as error:
        if "out-of-date database schema" in str(error):
            raise UserError(
                f"{uri} was written by another MLflow version than {_mlflow_version()}; back it up "
                f"and run `mlflow db upgrade {uri}`, or set another tracking.uri"
            ) from None
        # On a server, another process may have created it since we looked.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise UserError(f"the MLflow store {uri} cannot be used: {in_one_line(error)}") from None
    experiment_id(client, name)
