"""What SLURM's queue says of a sweep's jobs, beside what the runs' own files say.

The files come first: they know whether a run is done, and why it is not.  SLURM knows of jobs that
have not begun, or are no more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bfpo_exp.errors import UserError
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.slurm_jobs import arrays, job_name, slurm
from bfpo_exp.sweep.state import DONE, JobState, job_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queued:
    """A job in SLURM's queue: its id (``12_3`` in an array), state, the reason of its waiting, its nodes."""

    id: str
    state: str
    reason: str
    nodes: str

    @property
    def waits(self) -> bool:
        """Whether it has not begun, or is to begin again."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    def __str__(self) -> str:
        if self.waits:
            return f"SLURM job {self.id} waits: {self.reason}"
        return f"SLURM job {self.id}, {self.state.lower()} on {self.nodes or 'no node yet'}"


def queue(manifest: Manifest) -> dict[int, Queued]:
    """Who in SLURM's queue is to do which job of the sweep; a `UserError` if SLURM does not answer."""
    lines = slurm("squeue", "--me", "--noheader", "--array", "--format=%i|%K|%T|%r|%N|%j").splitlines()
    by_place: dict[tuple[str, str], Queued] = {}
    for line in lines:
        id_, index, state, reason, nodes, name = line.split("|", 5)
        by_place[name, index] = Queued(id_, state, reason, nodes)
    found: dict[int, Queued] = {}
    if not by_place:
        return found
    for number, array in arrays(manifest):  # the latest first: it holds what was resumed last
        name = job_name(manifest, number)
        for place, task in enumerate(array.tasks):
            job = by_place.get((name, str(place)))
            if job is not None and not task.stages:
                for job_number in task.numbers:
                    found.setdefault(job_number, job)
    return found


def seen_by_slurm(manifest: Manifest, states: Sequence[JobState]) -> list[JobState]:
    """The states with what SLURM knows beyond the files; as they are if it does not answer."""
    if all(state.state in (*DONE, "failed") for state in states):
        return list(states)
    try:
        jobs = queue(manifest)
    except UserError as error:
        log.warning("warning: only the runs' own files are told of: %s", error)
        return list(states)
    return [_seen(manifest, state, jobs.get(state.number)) for state in states]


def _seen(manifest: Manifest, state: JobState, job: Queued | None) -> JobState:
    if state.state in (*DONE, "failed"):
        return state
    if job is not None and (job.waits or state.state != "running"):
        return replace(state, state="queued", beat=None, reason=str(job))
    if job is None:
        now = job_state(manifest, state.number)  # it may have ended since its files were read
        return (
            now
            if now.state in (*DONE, "failed")
            else replace(now, state="lost", reason="SLURM has no job for it")
        )
    return state
