"""What MLflow lacks of a sweep's runs, sent from their folders, once, whoever asks and however often."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from bfpo_exp.paths import home
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.state import DONE, JobState
from bfpo_exp.tracking.client import connect, in_one_line
from bfpo_exp.tracking.parent import has_child
from bfpo_exp.tracking.publication import Publication
from bfpo_exp.tracking.recorder import PUBLICATION, Recorder, failed
from bfpo_exp.tracking.store import resolve
from bfpo_exp.tracking.sync_later import LATER

if TYPE_CHECKING:
    from bfpo_exp.config.schema import Config

log = logging.getLogger(__name__)


def sync(manifest: Manifest, states: Sequence[JobState], *, wait: bool = False) -> int:
    """Send what MLflow lacks of the runs that stand so; how many it still lacks, if it could not be reached.

    Runs that send themselves are left to it while they run.  Another process that sends already is
    left to it, or waited for with ``wait``.
    """
    uri = resolve(manifest.config(0).tracking.uri, home())
    lacking = [state for state in states if _lacks(manifest, state, uri)]
    if not lacking:
        return 0
    try:
        with FileLock(home() / ".sync.lock", timeout=-1 if wait else 0):
            for sent, state in enumerate(lacking):
                _send(manifest, state, uri)
                if state.state in (*DONE, "failed") and _lacks(manifest, state, uri):
                    return len(lacking) - sent  # MLflow is away, and the others would wait in vain, too
    except Timeout:
        log.info("another process sends to MLflow already")
    return 0


def _lacks(manifest: Manifest, state: JobState, uri: str) -> bool:
    """Whether MLflow has not been sent all of a run that this process may send."""
    run_dir = manifest.run_dir(state.number)
    if state.state in DONE:
        return not has_child(uri, manifest.parent_id, run_dir)
    if not (run_dir / "config.yaml").exists():  # it has not begun
        return False
    sent = Publication.load(run_dir / PUBLICATION, uri)
    metrics = run_dir / "metrics.jsonl"
    behind = sent.offset != (metrics.stat().st_size if metrics.exists() else 0)
    if state.state == "failed":
        return behind or sent.status != "FAILED"
    return (run_dir / LATER).exists() and (behind or sent.run_id is None or sent.status != "RUNNING")


def _send(manifest: Manifest, state: JobState, uri: str) -> None:
    from bfpo_exp.run import display_name, show_in

    config: Config = manifest.config(state.number)
    run_dir = manifest.run_dir(state.number)
    if state.state in DONE:
        return show_in(config, uri, manifest.parent_id, run_dir)
    recorder = Recorder(
        uri, config.tracking.experiment, run_dir, display_name(config, run_dir), manifest.parent_id
    )
    if state.state == "failed":
        return recorder.finish("FAILED", failed(state.reason))
    recorder.open()
    return recorder.sync()


def is_open(uri: str, run_id: str) -> bool:
    """Whether MLflow answers, and this run of it has not ended."""
    client = connect(uri)
    try:
        status: str = client.get_run(run_id).info.status
    except Exception as error:
        log.warning("warning: cannot read %s (%s)", uri, in_one_line(error))
        return False
    return status == "RUNNING"
