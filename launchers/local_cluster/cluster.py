"""Starting, stopping and breaking a cluster."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from local_cluster.errors import ClusterError
from local_cluster.layout import KILL_WAIT, MADE, Layout, free_ports, read
from local_cluster.machine import in_a_node, program, unavailable
from local_cluster.processes import Daemon, wait

CLIENT = 10.0  # seconds for a command of SLURM: squeue waits for minutes for a slurmctld that is gone
STARTING = 40.0  # seconds for all nodes to be ready
READY = {"idle", "plnd", "mix", "alloc", "comp"}
BROKEN = {"inval", "drain", "drng"}  # states that no waiting mends


class Cluster:
    """The daemons of a layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        root = layout.root
        munged = [
            *(program("munged"), "--foreground", f"--key-file={root}/munge.key"),
            *(f"--pid-file={root}/run/munged.own.pid", f"--seed-file={root}/run/munged.seed"),
            f"--socket={layout.socket}",
        ]
        self.munged = Daemon("munged", root, tuple(munged), "munged")
        slurmctld = [program("slurmctld"), "-D", "-f", str(layout.conf)]
        self.slurmctld = Daemon("slurmctld", root, tuple(slurmctld), "slurmctld")
        self.nodes = {
            name: Daemon(
                name,
                root,
                (*in_a_node(name, layout.hosts), program("slurmd"), "-D", "-N", name, "-f", str(layout.conf)),
                "unshare",
            )
            for name in layout.node_names
        }

    @property
    def daemons(self) -> list[Daemon]:
        """All of them, in the order in which they start."""
        return [self.munged, self.slurmctld, *self.nodes.values()]

    def environment(self) -> dict[str, str]:
        """This process's, in which SLURM's commands find this cluster and no job of another one."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN"))
        }
        path = f"{self.layout.bin}:{os.environ.get('PATH', os.defpath)}"
        return kept | {"SLURM_CONF": str(self.layout.conf), "PATH": path}

    def client(self, *command: str) -> str | None:
        """What a command of SLURM prints; None if it fails, hangs, or would hang."""
        if not self.slurmctld.pid():
            return None
        try:
            done = subprocess.run(
                [program(command[0]), *command[1:]],
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=CLIENT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return None
        return done.stdout if done.returncode == 0 else None

    def whole(self) -> bool:
        """Whether every daemon runs."""
        return all(daemon.pid() for daemon in self.daemons)

    def states(self) -> dict[str, str]:
        """SLURM's state of each node, such as ``idle`` or ``down*``; empty if slurmctld does not answer."""
        lines = (self.client("sinfo", "-h", "-N", "-o", "%N %t") or "").splitlines()
        return dict(line.split() for line in lines)

    def status(self) -> dict[str, str]:
        """A few words for each daemon."""
        told = {}
        states = self.states()
        for daemon in self.daemons:
            pid = daemon.pid()
            told[daemon.name] = f"process {pid}" if pid else "dead"
            if daemon.name in self.nodes:
                told[daemon.name] += f", SLURM says {states.get(daemon.name, 'nothing')}"
        return told

    def start(self) -> None:
        """Start what does not run; return when every node can take jobs, or end again what was started."""
        environment = self.environment()
        lacking = [daemon for daemon in self.daemons if not daemon.pid()]
        try:
            if self.munged in lacking:
                self.layout.socket.unlink(missing_ok=True)
            for daemon in lacking:
                daemon.start(environment)
                if daemon is self.munged:
                    self._wait(self.layout.socket.exists, daemon)
            self._wait(lambda: self._ready(*self.nodes), *self.daemons)
        except BaseException:
            for daemon in reversed(lacking):
                daemon.kill()
            raise

    def _wait(self, ready: Callable[[], bool], *needed: Daemon) -> None:
        """Return as soon as ``ready()``; `ClusterError` if a daemon that it needs ends before."""

        def ready_or_lost() -> bool:
            for daemon in needed:
                if not daemon.pid():
                    raise ClusterError(f"{daemon.name} ended: {daemon.last_words()} ({daemon.log})")
            return ready()

        last = needed[-1]
        wait(ready_or_lost, f"{last.name} to be ready ({last.log} says more)", STARTING)

    def _ready(self, *names: str) -> bool:
        """Whether these nodes can take jobs; `ClusterError` if waiting will not help one."""
        states = self.states()
        for name in names:
            if states.get(name, "").rstrip("*-") in BROKEN:
                raise ClusterError(f"{name} is {states[name]}: {self.slurmctld.last_words()}")
        # "idle*" is a node that does not answer, "mix-" one for which a job is planned.
        return all(states.get(name, "").rstrip("-") in READY for name in names)

    def node(self, name: str) -> Daemon:
        """A node by its name."""
        if name not in self.nodes:
            raise ClusterError(f"unknown node {name!r}; allowed: {', '.join(self.nodes)}")
        return self.nodes[name]

    def kill_node(self, name: str) -> None:
        """End a node as a power cut does."""
        self.node(name).kill()

    def start_node(self, name: str) -> None:
        """Start a node that was killed; return when it can take jobs."""
        if not self.node(name).pid():
            self.node(name).start(self.environment())
        self._wait(lambda: self._ready(name), self.munged, self.slurmctld, self.node(name))

    def cancel_jobs(self) -> None:
        """Cancel every job, and give those that run the time that SLURM gives them to end."""
        jobs = (self.client("squeue", "-h", "-o", "%A") or "").split()
        if jobs:
            self.client("scancel", *sorted(set(jobs)))
            with suppress(ClusterError):  # what does not end now is killed with its node
                wait(lambda: not self.client("squeue", "-h"), "the jobs to end", KILL_WAIT + 5)

    def kill(self) -> None:
        """End every daemon and all that runs on the nodes."""
        for daemon in reversed(self.daemons):
            daemon.kill()


def start(root: Path, nodes: int | None = None, gpus: int | None = None) -> tuple[Cluster, bool]:
    """Start the cluster in ``root``, or what of it does not run; whether anything had to be done.

    A cluster that crashed comes back with its queue.  ``nodes`` and ``gpus`` (2 and 4 if None) are
    those of a new one, and must be the same for one that exists.
    """
    if why := unavailable():
        raise ClusterError(why)
    try:
        root.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"cannot make {root} ({error.strerror})") from None
    with locked(root):
        made = read(root)
        check(root, made, nodes, gpus)
        if made and Cluster(made).whole():
            return Cluster(made), False
        if made is None or not any(daemon.pid() for daemon in Cluster(made).daemons):
            nodes, gpus = (made.nodes, made.gpus) if made else (nodes or 2, 4 if gpus is None else gpus)
            made = Layout(root, nodes, gpus, free_ports(1 + nodes))
            made.write()
        cluster = Cluster(made)
        cluster.start()
        return cluster, True


def check(root: Path, made: Layout | None, nodes: int | None, gpus: int | None) -> None:
    """See that ``root`` may hold this cluster; `ClusterError` if it holds another one, or other things."""
    if made is None:
        if strange := sorted(path.name for path in root.iterdir() if path.name not in MADE):
            raise ClusterError(f"{root} holds other things ({strange[0]}); give a new --root")
        return
    for what, given, has in (("--nodes", nodes, made.nodes), ("--gpus", gpus, made.gpus)):
        if given not in (None, has):
            raise ClusterError(
                f"{what} {given}, but the cluster in {root} was made with {has}; stop it first"
            )


def stop(root: Path) -> bool:
    """Cancel the jobs of the cluster in ``root``, end it and remove its files; False if there was none."""
    if not root.is_dir():
        return False
    with locked(root):
        if (layout := read(root)) is None:
            return False
        cluster = Cluster(layout)
        cluster.cancel_jobs()
        cluster.kill()
        for name in MADE:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        with suppress(OSError):  # someone has put something of his own there
            root.rmdir()
        return True


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the cluster's folder, which must be this user's, for one command; others wait."""
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        raise ClusterError(f"no cluster in {root}; start makes one") from None
    try:
        if os.fstat(folder).st_uid != os.geteuid():
            raise ClusterError(f"{root} belongs to another user; give another --root")
        fcntl.flock(folder, fcntl.LOCK_EX)
        if not root.exists() or os.fstat(folder).st_ino != root.stat().st_ino:
            raise ClusterError(f"another command has just removed {root}; try again")
        yield
    finally:
        os.close(folder)
