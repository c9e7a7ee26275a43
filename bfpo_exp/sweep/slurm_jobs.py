"""What was handed to SLURM for a sweep: arrays of jobs, each written down before it is handed in.

The folder ``slurm`` of a sweep holds, of each array by its number, ``<array>.json`` (what its jobs
are to do), ``<array>.sh`` (the script) and ``<array>-<index>.log`` (what a job printed outside of the
runs).  An array is known to SLURM by a name made of the sweep's folder and that number, so SLURM's
queue and these files say which job does what, whatever has become of the process that handed it in.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo_exp.errors import UserError
from bfpo_exp.paths import HOME_VARIABLE, home
from bfpo_exp.sweep.manifest import Manifest, write_whole

if TYPE_CHECKING:
    from bfpo_exp.sweep.slurm_settings import SlurmSettings

FOLDER = "slurm"
PATIENCE = 30.0  # seconds that a command of SLURM may take
SCRIPT = """\
#!/bin/bash
{options}

{setup}
export {home_variable}={home}
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
exec {python} -m bfpo_exp.sweep.slurm_batch {sweep} {array}
"""


@dataclass(frozen=True)
class Task:
    """One job of an array: it does the runs of these jobs of the sweep, or only stages that they share."""

    numbers: tuple[int, ...]
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Array:
    """Jobs that were handed in together.

    Attributes:
        tasks: what each is to do, by its index.
        nodes: of each job.
        processes: of each job, on all of its nodes.
        requeues: how often a job may come to its time limit and be queued again.
    """

    tasks: tuple[Task, ...]
    nodes: int
    processes: int
    requeues: int

    @classmethod
    def load(cls, manifest: Manifest, number: int) -> Array:
        """What was written down of an array."""
        kept = json.loads((manifest.folder / FOLDER / f"{number}.json").read_text())
        tasks = tuple(Task(tuple(task["numbers"]), tuple(task["stages"])) for task in kept.pop("tasks"))
        return cls(tasks, **kept)


def arrays(manifest: Manifest) -> list[tuple[int, Array]]:
    """Every array of the sweep by its number, the latest first."""
    return [(number, Array.load(manifest, number)) for number in range(_count(manifest) - 1, -1, -1)]


def job_name(manifest: Manifest, array: int) -> str:
    """The name of an array in SLURM; folders of the same name under two runs roots differ in it."""
    digest = hashlib.sha256(str(manifest.folder).encode()).hexdigest()[:6]
    return f"{manifest.name}.{digest}.{array}"


def logs(manifest: Manifest, number: int) -> list[Path]:
    """What the jobs printed outside of the runs that were to do this job of the sweep; the oldest first."""
    found = (
        manifest.folder / FOLDER / f"{array}-{index}.log"
        for array, what in arrays(manifest)
        for index, task in enumerate(what.tasks)
        if number in task.numbers
    )
    return [file for file in found if file.exists()][::-1]


def hand_in(
    manifest: Manifest, settings: SlurmSettings, tasks: Sequence[Task], after: str | None = None
) -> str:
    """Submit an array whose jobs begin when those of the job ``after`` have ended; its SLURM id.

    Raises `UserError` with SLURM's own words where it refuses.
    """
    array = _count(manifest)
    folder = manifest.folder / FOLDER
    folder.mkdir(exist_ok=True)
    at_a_time = f"%{settings.array_parallelism}" if settings.array_parallelism else ""
    log = str(folder / f"{array}-%a.log").replace("%", "%%").replace("%%a.log", "%a.log")
    options = [
        f"--job-name={job_name(manifest, array)}", f"--output={log}", "--open-mode=append", "--requeue",
        f"--signal=B:USR2@{settings.seconds_before_limit}", f"--array=0-{len(tasks) - 1}{at_a_time}",
        *settings.resources(),
    ]  # fmt: skip
    script = SCRIPT.format(
        options="\n".join(f'#SBATCH "{option}"' for option in options),
        setup="\n".join(settings.setup),
        home_variable=HOME_VARIABLE,
        home=shlex.quote(str(home())),
        python=shlex.quote(settings.python or sys.executable),
        sweep=shlex.quote(str(manifest.folder)),
        array=array,
    )
    (folder / f"{array}.sh").write_text(script)
    what = Array(tuple(tasks), settings.nodes, settings.processes, settings.requeues)
    write_whole(folder / f"{array}.json", json.dumps(asdict(what), indent=1))
    dependency = [f"--dependency=afterany:{after}"] if after else []
    try:
        told = slurm("sbatch", "--parsable", *dependency, str(folder / f"{array}.sh"))
    except UserError:
        (folder / f"{array}.json").unlink()
        raise
    return told.strip().partition(";")[0]


def cancel_all(manifest: Manifest) -> None:
    """Cancel every job of the sweep that SLURM still has."""
    names = [f"--name={job_name(manifest, array)}" for array, _ in arrays(manifest)]
    for name in names:
        slurm("scancel", name, "--me")


def slurm(*command: str) -> str:
    """What a command of SLURM prints; a `UserError` of its own words where it fails, hangs or is not here."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on this machine, so no SLURM; run the sweep where jobs are handed in, "
            "or here with hydra/launcher=local"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} has not answered in {PATIENCE:.0f} s: is SLURM's controller down?"
        ) from None
    if done.returncode:
        words = "; ".join(_words(done.stderr.splitlines()))
        raise UserError(f"SLURM refuses: {words or f'{command[0]} ended with {done.returncode}'}")
    return done.stdout


def _words(lines: Iterable[str]) -> list[str]:
    prefixes = ("sbatch: ", "scancel: ", "squeue: ", "scontrol: ", "error: ", "slurm_load_jobs ")
    found = []
    for line in lines:
        for prefix in prefixes:
            line = line.removeprefix(prefix)
        found.append(line.strip())
    return [line for line in found if line]


def _count(manifest: Manifest) -> int:
    """How many arrays the sweep has; one that SLURM refused left its script, and its number is used again."""
    return len(list((manifest.folder / FOLDER).glob("*.json")))
