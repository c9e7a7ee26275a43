"""The part of a SLURM job that starts its processes, sees them end, and knows what to do then.

    python -m bfpo_exp.sweep.slurm_batch SWEEP_DIR ARRAY

It is what the script of an array ends in, on the first node of each job.  The processes are those of
`bfpo_exp.sweep.job`, one a GPU.  They keep how a job of the sweep ended; what they could not say any
more is said here.  A job is queued again at its time limit, and where its processes alone were told to end;
SLURM itself does so when the job is preempted, or a node fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bfpo_exp.heartbeat import last_beat
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.slurm_jobs import Array
from bfpo_exp.sweep.state import Ending
from bfpo_exp.sweep.workers import death

FAILURE = "failure.txt"  # `bfpo_exp.run.OTHER_FAILURE`, whose module is heavy
INTERRUPTED = (130, 128 + signal.SIGTERM)  # exit codes of processes that have heeded a signal, or not
NODE_PATIENCE = 330.0  # seconds; SLURM's own, SlurmdTimeout, is 300 unless a cluster sets it
SIGNAL_PATIENCE = 5.0  # seconds; SLURM's signals to a job's processes and to its script come together
# Each process's place in the group, in the words that PyTorch and DeepSpeed read.
RANKS = 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'


class Batch:
    """One job of an array."""

    def __init__(self, manifest: Manifest, array: Array, index: int) -> None:
        self.manifest = manifest
        self.array = array
        self.task = array.tasks[index]
        self.step: subprocess.Popen[bytes] | None = None
        self.time_is_up = False
        self.ended_by_slurm = False

    def time_limit_nears(self, number: int, frame: object) -> None:
        """Have the processes save and end; srun hands the signal on."""
        self.time_is_up = True
        if self.step is not None:
            self.step.send_signal(signal.SIGUSR2)

    def ended(self, number: int, frame: object) -> None:
        """SLURM ends the job, and has told all processes of it itself."""
        if self.time_is_up and not self.ended_by_slurm:  # too little time was left to save
            self.queue_again("its time was up")
        self.ended_by_slurm = True

    def left(self) -> list[int]:
        """The jobs of the sweep that have not ended."""
        return [n for n in self.task.numbers if Ending.of(self.manifest.job_dir(n)) is None]

    def run(self) -> None:
        """Do what is left of the task."""
        while (numbers := self.left()) and not self.manifest.cancelled:
            started = time.time()
            code = self.do(numbers)
            if self.ended_by_slurm:
                return
            if self.time_is_up and self.unfinished(code):
                self.queue_again("its time was up")
                return
            if self.was_interrupted(numbers, started, code):
                if not self.slurm_ends_it(SIGNAL_PATIENCE):
                    self.queue_again("it was interrupted")
                return
            if self.task.stages and not code:
                return
            if self.left() != numbers:
                continue
            begun = next((n for n in numbers if self.was_begun(n, started)), numbers[0])
            words = self.last_words(begun, started)
            if words is None and self.array.nodes > 1 and self.slurm_ends_it(NODE_PATIENCE):
                return  # a node has died
            if self.task.stages:
                self.fail(numbers, f"what it shares with other jobs ({self.what}) failed: {_died(code)}")
            else:
                self.fail([begun], words or _died(code))

    def do(self, numbers: Sequence[int]) -> int:
        """Start the processes and wait for their end; srun's exit code."""
        only = ["--only", self.what] if self.task.stages else []
        words = [sys.executable, "-m", "bfpo_exp.sweep.job", str(self.manifest.folder), *only]
        ranks = ["bash", "-c", RANKS, "rank"] if self.array.processes > 1 else []
        self.step = subprocess.Popen(
            ["srun", "--kill-on-bad-exit=1", *ranks, *words, *map(str, numbers)], stdin=subprocess.DEVNULL
        )
        if self.time_is_up:  # in the moment before
            self.step.send_signal(signal.SIGUSR2)
        return self.step.wait()

    def slurm_ends_it(self, patience: float) -> bool:
        """Whether SLURM ends the job within so many seconds; it then queues it again itself."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not self.ended_by_slurm:
            time.sleep(0.5)
        return self.ended_by_slurm

    @property
    def what(self) -> str:
        """The shared stages as they stand on a command line."""
        return ",".join(self.task.stages)

    @property
    def id(self) -> str:
        """Its name for SLURM; one job of an array has the array's own number as its id."""
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"

    def unfinished(self, code: int) -> bool:
        """Whether something of the task is not done yet."""
        return bool(code if self.task.stages else self.left())

    def was_begun(self, number: int, since: float) -> bool:
        """Whether a process was at the job's run."""
        last = last_beat(self.manifest.run_dir(number))
        return last is not None and last[1] >= since

    def was_interrupted(self, numbers: Sequence[int], since: float, code: int) -> bool:
        """Whether the processes were told to end by someone else, and the job was not.

        That was seen after a node had died and come back: its job's next try got a signal half a minute late.

        A process that was killed has another code, though it makes srun end the others in this way.
        """
        if code not in INTERRUPTED:
            return False
        files = [self.manifest.run_dir(number) / "status.json" for number in numbers]
        recent = [file for file in files if file.exists() and file.stat().st_mtime >= since]
        reasons = [json.loads(file.read_text()).get("reason") for file in recent]
        return bool(self.task.stages) or "interrupted" in reasons

    def last_words(self, number: int, since: float) -> str | None:
        """What a process other than the main one died of."""
        file = self.manifest.run_dir(number) / FAILURE
        return file.read_text() if file.exists() and file.stat().st_mtime >= since else None

    def fail(self, numbers: Sequence[int], reason: str) -> None:
        """Keep that these jobs failed."""
        print(f"failed: {reason}", flush=True)
        for number in numbers:
            Ending("failed", 0.0, reason).save(self.manifest.job_dir(number))

    def queue_again(self, why: str) -> None:
        """Go to the queue's end, unless that has been too often."""
        self.ended_by_slurm = True
        before = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        if before >= self.array.requeues:
            limit = f"requeues={self.array.requeues}"
            return self.fail(self.left(), f"{why}, and it was queued again {before} times ({limit})")
        done = subprocess.run(["scontrol", "requeue", self.id], capture_output=True, text=True, check=False)
        print(f"{why}; {done.stderr.strip() or 'queued again'}", flush=True)
        return None


def _died(code: int) -> str:
    return death(128 - code if code > 128 else code)


def main(argv: Sequence[str] | None = None) -> int:
    """Always 0: how jobs ended is in their files, and a job that SLURM calls failed would say less."""
    folder, array = sys.argv[1:] if argv is None else argv
    manifest = Manifest.load(Path(folder))
    batch = Batch(manifest, Array.load(manifest, int(array)), int(os.environ["SLURM_ARRAY_TASK_ID"]))
    signal.signal(signal.SIGUSR2, batch.time_limit_nears)
    signal.signal(signal.SIGTERM, batch.ended)
    batch.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
