"""Going on with a sweep, and cancelling one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from bfpo_exp.errors import UserError
from bfpo_exp.heartbeat import living
from bfpo_exp.sweep.manifest import CANCELLED, Manifest
from bfpo_exp.sweep.state import OUTCOME, job_states, summary, unfinished

log = logging.getLogger(__name__)
PATIENCE = 30.0  # seconds that a cancelled sweep has to end


def resume(manifest: Manifest, force: bool) -> int:
    """Do what is not done of a sweep, from its checkpoints on; the exit code, 1 if some of it fails again.

    Raises `UserError` while another process does the sweep, and where the code has changed since,
    so that the rest would not be comparable; with ``force`` the rest is done with the new code.
    """
    from bfpo_exp.paths import writable_home
    from bfpo_exp.run import run_code
    from bfpo_exp.sweep import local, slurm
    from bfpo_exp.sweep.ending import concluded
    from bfpo_exp.tracking.environment import environment_tags
    from bfpo_exp.tracking.parent import open_parent
    from bfpo_exp.tracking.store import prepare

    if not manifest.jobs:
        raise UserError(f"the sweep {manifest.name} has no jobs; start it again")
    if beat := living(manifest.folder):
        raise UserError(
            f"the sweep {manifest.name} is being done already, by process {beat.pid} on {beat.host}"
        )
    states = job_states(manifest)
    numbers = unfinished(states)
    log.info("sweep %s: %s", manifest.name, summary(states))
    on_slurm = manifest.launcher["name"] == "slurm"
    if on_slurm and (theirs := {s.number for s in states if s.state in ("queued", "running")}):
        numbers = [number for number in numbers if number not in theirs]
        if not numbers:
            raise UserError(f"the sweep {manifest.name} is being done already: SLURM has {len(theirs)} jobs")
    uri = prepare(manifest.config(0).tracking, writable_home())
    if not numbers:
        return concluded(manifest)
    if manifest.code != run_code() and not force:
        raise UserError(
            f"the code has changed since the sweep {manifest.name} began, so its {len(numbers)} unfinished "
            "runs would not compare with the finished ones; restore the code, or go on with --force"
        )
    manifest.parent_id = open_parent(
        uri, manifest.experiment, manifest.name, manifest.folder, environment_tags(), {}
    )
    _begin_again(manifest, numbers)
    if on_slurm:
        return slurm.drive(manifest, numbers)
    local.drive(manifest, numbers)
    return concluded(manifest)


def _begin_again(manifest: Manifest, numbers: Sequence[int]) -> None:
    """Write down that these jobs are to be done, with the code as it is now."""
    from bfpo_exp.run import run_code, run_key

    for number in numbers:
        (manifest.job_dir(number) / OUTCOME).unlink(missing_ok=True)
        manifest.jobs[number] = replace(manifest.job(number), key=run_key(manifest.config(number)))
    manifest.code, manifest.started = run_code(), time.time()
    (manifest.folder / CANCELLED).unlink(missing_ok=True)
    manifest.save()


def cancel(manifest: Manifest) -> None:
    """Let no further job of a sweep begin, interrupt those that run, and end its MLflow run as KILLED.

    Raises `UserError` if the process that does the sweep is still at it after `PATIENCE` seconds.
    """
    (manifest.folder / CANCELLED).touch()
    if manifest.launcher["name"] == "slurm":
        _cancel_on_slurm(manifest)
    if living(manifest.folder) is None:
        from bfpo_exp.sweep.ending import interrupted

        return interrupted(manifest)
    deadline = time.monotonic() + PATIENCE
    while beat := living(manifest.folder):
        if time.monotonic() > deadline:
            raise UserError(
                f"the sweep {manifest.name} is cancelled and begins no further job, but process {beat.pid} "
                f"on {beat.host} has not ended yet"
            )
        time.sleep(0.2)
    return None


def _cancel_on_slurm(manifest: Manifest) -> None:
    from bfpo_exp.sweep.slurm_jobs import cancel_all
    from bfpo_exp.sweep.slurm_queue import queue
    from bfpo_exp.tracking.sync import sync

    cancel_all(manifest)
    deadline = time.monotonic() + PATIENCE
    while jobs := queue(manifest):
        if time.monotonic() > deadline:
            raise UserError(f"the sweep {manifest.name} is cancelled, but {len(jobs)} jobs go on still")
        time.sleep(1.0)
    sync(manifest, job_states(manifest), wait=True)
