"""A sweep on SLURM: its jobs handed in as arrays, and looked after from wherever a command is typed.

First comes what several jobs share, in one array for each step of the way (models, then log-probs of
the reference), then the runs.  An array begins when the one before it has ended, however: a job that
needs what could not be made finds that written down as its own failure.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.paths import home
from bfpo_exp.progress import progress
from bfpo_exp.rewards.use import trains_reward_model
from bfpo_exp.sweep.ending import command, concluded
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.shared import shared_stages
from bfpo_exp.sweep.slurm_jobs import Task, hand_in, slurm
from bfpo_exp.sweep.slurm_settings import SlurmSettings, checked_settings
from bfpo_exp.sweep.state import DONE, JobState, job_states
from bfpo_exp.tracking.store import resolve
from bfpo_exp.tracking.sync import is_open, sync

log = logging.getLogger(__name__)
POLL = 10.0  # seconds between two looks at jobs that are waited for; SLURM serves others, too


def would_take(settings: SlurmSettings) -> None:
    """A `UserError` in SLURM's words where no node or partition can ever run such a job."""
    slurm("sbatch", "--test-only", *settings.resources(), "--wrap", "true")


def submit(manifest: Manifest, numbers: Sequence[int]) -> None:
    """Hand in these jobs of the sweep, and before them what they share."""
    settings = settings_of(manifest)
    for number in numbers:
        _check_batches(manifest.config(number), settings.processes)
    ids: list[str] = []
    for tasks in planned_arrays(manifest, numbers, settings.runs_per_job):
        ids.append(hand_in(manifest, settings, tasks, after=ids[-1] if ids else None))
    runs = f"{len(numbers)} run{'s' if len(numbers) > 1 else ''}"
    jobs = f"job{'s' if len(ids) > 1 else ''} {', '.join(ids)}"
    print(f"sweep {manifest.name}: {runs} handed in to SLURM, {jobs}")
    print(f"how they stand: {command('bfpo-sweep')} status {manifest.name}")
    print(f"do what failed: {command('bfpo-sweep')} resume {manifest.name}", flush=True)


def _check_batches(config: Config, processes: int) -> None:
    """A `UserError` where a batch cannot be shared out over the processes that a run is to have."""
    stages = {"base": config.train.base, "sft": config.train.sft, "preference": config.train}
    if trains_reward_model(config):
        stages["reward"] = config.train.reward
    for stage, optimisation in stages.items():
        if stage in config.stages and optimisation.batch % processes:
            raise UserError(
                f"the {stage} stage's batch of {optimisation.batch} cannot be shared out evenly over "
                f"{processes} processes; give another batch, nodes, gpus_per_node or tasks_per_node"
            )


def planned_arrays(manifest: Manifest, numbers: Sequence[int], runs_per_job: int) -> list[list[Task]]:
    """What is to be done in which order: shared stages by what they build on, then the runs."""
    shared = shared_stages({number: manifest.config(number) for number in numbers})
    levels: list[list[Task]] = []
    level_of: list[int] = []
    for stages in shared:
        level = 0 if stages.after is None else level_of[stages.after] + 1
        level_of.append(level)
        if level == len(levels):
            levels.append([])
        levels[level].append(Task(stages.numbers, tuple(stages.stages)))
    starts = range(0, len(numbers), runs_per_job)
    return [*levels, [Task(tuple(numbers[start : start + runs_per_job])) for start in starts]]


def drive(manifest: Manifest, numbers: Sequence[int]) -> int:
    """Hand in jobs of a sweep that goes on; with the launcher's ``wait``, see them end.  The exit code."""
    submit(manifest, numbers)
    if not settings_of(manifest).wait:
        return 0
    wait_for(manifest, numbers)
    return concluded(manifest)


def wait_for(manifest: Manifest, numbers: Sequence[int]) -> None:
    """Return when SLURM has none of these jobs any more, and tell of each as it ends.

    Interrupted, it leaves the jobs to go on.
    """
    told: set[int] = set()
    try:
        with progress("sweep", len(numbers)) as advance:
            while True:
                states = [state for state in job_states(manifest) if state.number in numbers]
                for state in states:
                    if state.state in (*DONE, "failed") and state.number not in told:
                        told.add(state.number)
                        what = f"{state.state}: {state}" if state.reason else state.state
                        log.info("[%d/%d] %s: %s", len(told), len(numbers), state.name, what)
                        advance(1)
                sync(manifest, states)
                if not any(state.state in ("queued", "running") for state in states):
                    return
                time.sleep(POLL)
    except KeyboardInterrupt:
        log.info("the jobs of the sweep %s go on; to end them: bfpo-sweep cancel", manifest.name)
        raise


def look_after(manifest: Manifest) -> list[JobState]:
    """Send MLflow what it lacks of the sweep's runs; when all have ended, compare them.  How they stand."""
    states = job_states(manifest)
    sync(manifest, states)
    ended = all(state.state in (*DONE, "failed") for state in states)
    uri = resolve(manifest.config(0).tracking.uri, home())
    if ended and is_open(uri, manifest.parent_id):
        concluded(manifest)
    return states


def settings_of(manifest: Manifest) -> SlurmSettings:
    """The launcher's settings, as the sweep was started with."""
    return checked_settings({name: value for name, value in manifest.launcher.items() if name != "name"})
