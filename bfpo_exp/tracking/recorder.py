"""Publishing a run's folder to MLflow, such that no failure of MLflow costs the run anything."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from bfpo_exp.tracking.client import connect, in_one_line
from bfpo_exp.tracking.metrics_file import Entry, MetricsFile
from bfpo_exp.tracking.params import flatten, mlflow_name
from bfpo_exp.tracking.publication import Publication
from bfpo_exp.tracking.runs import FAILURE, KIND, LABEL, PARENT, find_run, log_tags, open_run
from bfpo_exp.tracking.tables import is_table, tables_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

PUBLICATION = "mlflow.json"
METRICS_PER_CALL = 1000  # MLflow's limit
_log = logging.getLogger(__name__)


class Recorder:
    """One run's folder and the MLflow run that shows it.

    The folder holds ``config.yaml`` (the resolved config), ``metrics.jsonl`` (`MetricsFile`),
    ``tags.json`` ({str: str}) and ``artifacts/``; how much of it was sent is kept beside them in
    ``mlflow.json``.  That is written after each send, and MLflow keeps one of two equal metrics
    (name, step, time, value), so a kill at any moment neither loses nor doubles a value.

    A failure of MLflow is never raised: it is kept in ``failure``, logged once as a warning, and
    made good by a later `sync` or `finish`.
    """

    RETRY_AFTER = 30.0  # seconds that `sync` leaves a store alone after a failure,
    RETRY_SHARE = 0.05  # or longer, such that a server that hangs costs at most this share of the time

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_dir: Path | str,
        name: str,
        parent_id: str | None = None,
        publication: str = PUBLICATION,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.experiment = experiment
        self.name = name
        self.parent_id = parent_id
        self.publication = Publication.load(self.run_dir / publication, uri, parent_id)
        self.failure: str | None = None
        self._metrics = MetricsFile(self.run_dir / "metrics.jsonl")
        self._client: MlflowClient | None = None
        self._is_open = False
        self._retry_at = 0.0

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, once there is one."""
        return self.publication.run_id

    def open(self) -> None:
        """Create the MLflow run, or reopen the one that this folder has; send params and tags."""
        with self._shielded():
            self._opened()

    def sync(self) -> None:
        """Send the lines of ``metrics.jsonl`` that were not sent yet."""
        if time.monotonic() < self._retry_at:
            return
        with self._shielded():
            self._send_metrics(self._opened())

    def finish(self, status: Literal["FINISHED", "FAILED"], tags: Mapping[str, str] | None = None) -> None:
        """Send what is left, artifacts and tags too, and end the MLflow run.

        ``tags`` are added to those of ``tags.json``; of a failed run, ``failure`` is the reason.
        """
        self.open()
        if not self._is_open:
            return
        client = self._connect()
        with self._shielded():
            self._send_metrics(client)
        with self._shielded():
            self._send_artifacts(client)
        with self._shielded():
            log_tags(client, self._id, self._tags() | dict(tags or {}))
            client.set_terminated(self._id, status)
            self.publication.status = status
            self.publication.save()

    def is_whole(self) -> bool:
        """Whether MLflow holds a finished run with every metric of the folder."""
        sent = self.publication
        if sent.status != "FINISHED" or sent.offset != self._size():
            return False
        with self._shielded():
            return find_run(self._connect(), sent, self.experiment) is not None
        return False

    @property
    def _id(self) -> str:
        assert self.publication.run_id is not None
        return self.publication.run_id

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self.publication.uri)
        return self._client

    def _opened(self) -> MlflowClient:
        client = self._connect()
        if not self._is_open:
            self.publication.parent_id = self.parent_id
            config = self._config()
            label = {KIND: "run", LABEL: str(config.get("method") or config["loss"]["name"])}
            parent = {PARENT: self.parent_id} if self.parent_id else {}
            tags = self._tags() | label | parent
            open_run(client, self.publication, self.experiment, self.name, flatten(config), tags)
            self._is_open = True
        return client

    def _send_metrics(self, client: MlflowClient) -> None:
        pending: list[Metric] = []
        # A file shorter than what was sent is another file: a run started over in this folder.
        start = sent = self.publication.offset if self.publication.offset <= self._size() else 0
        for end, entry in self._metrics.read_from(start):
            new = _as_mlflow(entry)
            if len(pending) + len(new) > METRICS_PER_CALL:
                self._send(client, pending, sent)
                pending = []
            pending += new
            sent = end
        self._send(client, pending, sent)

    def _send(self, client: MlflowClient, metrics: list[Metric], offset: int) -> None:
        for start in range(0, len(metrics), METRICS_PER_CALL):
            client.log_batch(self._id, metrics=metrics[start : start + METRICS_PER_CALL], synchronous=True)
        if metrics:
            self.publication.offset = offset
            self.publication.save()

    def _send_artifacts(self, client: MlflowClient) -> None:
        root = self.run_dir / "artifacts"
        files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
        for name, path in files.items():
            stamp = [path.stat().st_size, path.stat().st_mtime_ns]
            if self.publication.artifacts.get(name) == stamp:
                continue
            folder = name.rpartition("/")[0]
            client.log_artifact(self._id, str(path), folder or None)
            self.publication.artifacts[name] = stamp
            self.publication.save()
        log_tags(client, self._id, tables_tag([name for name, path in files.items() if is_table(path)]))

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((self.run_dir / "config.yaml").read_text())
        return config

    def _tags(self) -> dict[str, str]:
        path = self.run_dir / "tags.json"
        tags: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        return tags

    def _size(self) -> int:
        return self._metrics.path.stat().st_size if self._metrics.path.exists() else 0

    @contextmanager
    def _shielded(self) -> Iterator[None]:
        """Keep and report what goes wrong: hours of training are worth more than their display."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:
            if self.failure is None:
                _log.warning(
                    "%s: cannot record to %s (%s); the run goes on, its folder keeps everything, and what "
                    "is missing is sent later",
                    self.name,
                    self.publication.uri,
                    in_one_line(error),
                )
            self.failure = in_one_line(error)
            now = time.monotonic()
            self._retry_at = now + max(self.RETRY_AFTER, (now - started) / self.RETRY_SHARE)
        else:
            self.failure = None


def failed(reason: str) -> dict[str, str]:
    """The tag that says why a run failed, in one line."""
    return {FAILURE: " ".join(reason.split())}


def publish_copy(
    uri: str, experiment: str, run_dir: Path | str, name: str, parent_id: str | None
) -> str | None:
    """Show a finished run as a child of ``parent_id`` too, tagged ``reused_from=<run id>``.

    Where the run is that parent's own child already, what MLflow lacks of it is sent.  Gives the
    child's run id, or None where MLflow could not be reached.
    """
    original = Publication.load(Path(run_dir) / PUBLICATION, uri, parent_id)
    is_copy = original.parent_id != parent_id
    file = f"mlflow-{parent_id or 'alone'}.json" if is_copy else PUBLICATION
    recorder = Recorder(uri, experiment, run_dir, name, parent_id, file)
    if not recorder.is_whole():
        recorder.finish("FINISHED", {"reused_from": original.run_id or ""} if is_copy else None)
    return recorder.run_id


def _as_mlflow(entry: Entry) -> list[Metric]:
    from mlflow.entities import Metric

    stamp = int(entry.time * 1000)
    return [Metric(mlflow_name(name), value, stamp, entry.step) for name, value in entry.metrics.items()]
