"""A real SLURM for tests: two nodes with four fake GPUs each, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_cluster.cluster import Cluster
from local_cluster.layout import read
from local_cluster.machine import unavailable

LOCAL_CLUSTER = Path(__file__).parents[1] / "launchers" / "local_cluster"


class Slurm:
    """A running cluster, and the commands of SLURM on it."""

    def __init__(self, root: Path, call: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        self.root = root
        self.call = call
        layout = read(root)
        assert layout is not None
        self.cluster = Cluster(layout)
        self.environment = self.cluster.environment()

    def run(self, *command: str, cwd: Path | None = None, seconds: float = 60) -> str:
        """What a command prints, with this cluster in its environment; it must not fail, nor hang."""
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=cwd,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, folder: Path, script: str, *options: str) -> str:
        """Hand in a shell script whose output goes to ``folder/<job>.out``; its job id."""
        output = ("--output", str(folder / "%A.out"), "--open-mode=append")
        return self.run("sbatch", "--parsable", *output, *options, "--wrap", script, cwd=folder).strip()

    def states(self, job: str) -> dict[str, str]:
        """State of a job, or of each task of an array, by id."""
        lines = self.run("sacct", "-n", "-P", "-o", "JobID,State", "-j", job).splitlines()
        return dict(line.split("|") for line in lines)

    def wait(self, job: str, state: str = "COMPLETED", seconds: float = 60) -> None:
        """Return when a job, with all tasks of an array, is in this state."""
        end = time.monotonic() + seconds
        while set(states := self.states(job).values()) != {state}:
            assert time.monotonic() < end, f"job {job}: {states}, not {state} after {seconds} s"
            time.sleep(0.2)

    def output(self, folder: Path, job: str, lines: int = 1, seconds: float = 60) -> list[str]:
        """What a job has printed, as soon as that is so many lines."""
        end = time.monotonic() + seconds
        file = folder / f"{job}.out"
        while len(told := file.read_text().splitlines() if file.exists() else []) < lines:
            assert time.monotonic() < end, f"job {job} ({self.states(job)}) has printed only {told}"
            time.sleep(0.2)
        return told

    def kill_node(self, name: str) -> None:
        """SIGKILL everything on a node."""
        assert self.call("kill-node", name).returncode == 0

    def start_node(self, name: str) -> None:
        """Start it again."""
        assert self.call("start-node", name).returncode == 0


def local_cluster(
    *arguments: str, root: Path, before: tuple[str, ...] = (sys.executable, str(LOCAL_CLUSTER))
) -> subprocess.CompletedProcess[str]:
    """``launchers/local_cluster ARGUMENTS --root ROOT``, as a user types it."""
    return subprocess.run(
        [*before, *arguments, "--root", str(root)], capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def a_cluster() -> Iterator[Slurm]:
    """A cluster that begins and ends here; skips the test, with the reason, where there cannot be one."""
    if why := unavailable():
        pytest.skip(why)
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the path of a socket has at most 107 bytes

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return local_cluster(*arguments, root=root)

    started = call("start")
    assert started.returncode == 0, started.stderr
    try:
        yield Slurm(root, call)
    finally:
        stopped = call("stop")
        assert stopped.returncode == 0, stopped.stderr


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster that tests share; who kills a node starts it again."""
    with a_cluster() as cluster:
        yield cluster


def processes(slurm: Slurm) -> dict[int, str]:
    """Every living process of a cluster, jobs included: its number and the moment of its start."""
    sessions = {daemon.pid() for daemon in slurm.cluster.daemons}
    namespaces = {os.readlink(f"/proc/{pid}/ns/pid_for_children") for pid in sessions if pid is not None} - {
        os.readlink("/proc/self/ns/pid")
    }
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (stat := state_of(int(entry.name))):
            session, began = int(stat[3]), stat[19]
            try:
                inside = os.readlink(entry / "ns" / "pid") in namespaces
            except OSError:
                inside = False
            if inside or session in sessions:
                found[int(entry.name)] = began
    return found


def alive(found: dict[int, str]) -> list[int]:
    """Those of `processes` that still live."""
    return [pid for pid, began in found.items() if (stat := state_of(pid)) and stat[19] == began]


def state_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; empty for a process that is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
