"""How the jobs of a sweep stand, read from their own files alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from bfpo_exp.heartbeat import Beat, last_beat, living
from bfpo_exp.sweep.manifest import Manifest, write_whole

OUTCOME = "outcome.json"
State = Literal["queued", "running", "finished", "reused", "failed", "lost"]
DONE: tuple[State, ...] = ("finished", "reused")


@dataclass(frozen=True)
class Ending:
    """How a job ended, as it is kept beside the job's config."""

    status: Literal["finished", "reused", "failed"]
    seconds: float
    reason: str = ""  # of a failure, in one line

    def save(self, job_dir: Path) -> None:
        """Keep it in the job's folder."""
        write_whole(job_dir / OUTCOME, json.dumps(asdict(self)))

    @classmethod
    def of(cls, job_dir: Path) -> Ending | None:
        """What is kept in a job's folder; None where the job has not ended."""
        try:
            return cls(**json.loads((job_dir / OUTCOME).read_text()))
        except (FileNotFoundError, ValueError):  # a machine that lost power leaves empty files
            return None


@dataclass(frozen=True)
class JobState:
    """One job: ``lost`` is one that began, did not end, and that nobody is doing now."""

    number: int
    name: str
    state: State
    beat: Beat | None = None  # of the process that does it, or did when it was lost
    reason: str = ""  # of a failure
    seconds: float | None = None  # that a finished job took

    def __str__(self) -> str:
        if self.state == "running" and self.beat:
            return f"{self.beat} on {self.beat.host}" if str(self.beat) else f"on {self.beat.host}"
        if self.state == "lost" and self.beat:
            return f"was at {self.beat.stage or 'its start'} on {self.beat.host}, process {self.beat.pid}"
        if self.state == "finished" and self.seconds is not None:
            return f"{self.seconds:.0f} s"
        return self.reason


def job_state(manifest: Manifest, number: int) -> JobState:
    """How one job stands.

    A run that has finished is not enough: the job is done when this sweep has seen it, since only
    then MLflow shows it as a run of this sweep.
    """
    name, folder = manifest.job(number).name, manifest.job_dir(number)
    run_dir = manifest.run_dir(number)
    ending = Ending.of(folder)
    if ending and (ending.status == "failed" or (run_dir / "status.json").exists()):
        return JobState(number, name, ending.status, reason=ending.reason, seconds=ending.seconds)
    if beat := living(run_dir):
        return JobState(number, name, "running", beat)
    last = last_beat(run_dir)
    # A beat from before this sweep's start is that of another sweep, or of an earlier try.
    if last and last[1] >= manifest.started:
        return JobState(number, name, "lost", last[0])
    return JobState(number, name, "queued")


def job_states(manifest: Manifest) -> list[JobState]:
    """How every job stands, in the order of their numbers."""
    states = [job_state(manifest, number) for number in manifest.numbers]
    if manifest.launcher["name"] == "slurm":
        from bfpo_exp.sweep.slurm_queue import seen_by_slurm

        return seen_by_slurm(manifest, states)
    return states


def unfinished(states: Sequence[JobState]) -> list[int]:
    """The numbers of the jobs that are not done."""
    return [state.number for state in states if state.state not in DONE]


def summary(states: Sequence[JobState]) -> str:
    """How many jobs stand how, in one line."""
    counts = Counter(state.state for state in states)
    order: tuple[State, ...] = ("finished", "reused", "running", "queued", "failed", "lost")
    parts = [f"{counts[state]} {state}" for state in order if counts[state]]
    return f"{len(states)} job{'s' if len(states) != 1 else ''}: {', '.join(parts) or 'none'}"
