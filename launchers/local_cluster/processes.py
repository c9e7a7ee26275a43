"""Daemons that outlive the command that starts them, and are found again by their pid files."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from local_cluster.errors import ClusterError

PATIENCE = 10.0  # seconds for a process to go after SIGKILL


@dataclass(frozen=True)
class Daemon:
    """One process that is kept running, in the foreground of a session of its own.

    Attributes:
        name: of its files, ``run/<name>.pid`` and ``log/<name>.log``.
        root: the cluster's folder.
        command: program and arguments; the last one names the cluster, so no other process has it.
        comm: name of the process in /proc.
    """

    name: str
    root: Path
    command: tuple[str, ...]
    comm: str

    @property
    def pid_file(self) -> Path:
        """Holds its process id once it was started."""
        return self.root / "run" / f"{self.name}.pid"

    @property
    def log(self) -> Path:
        """All that it says."""
        return self.root / "log" / f"{self.name}.log"

    def start(self, environment: dict[str, str]) -> None:
        """Start it, without waiting for what it does."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        self.pid_file.write_text(f"{process.pid}\n")
        # For a moment /proc shows neither the old name nor the new one.
        wait(lambda: bool(self.pid()) or process.poll() is not None, f"{self.name} to begin", PATIENCE)

    def pid(self) -> int | None:
        """Its process id while it lives; None for one whose number another process has got since."""
        try:
            pid = int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None
        return pid if pid > 1 and self._is(pid) else None

    def _is(self, pid: int) -> bool:
        try:
            arguments = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")[:-1]
        except OSError:
            return False
        return living(pid) == self.comm and arguments[-1:] == [os.fsencode(self.command[-1])]

    def kill(self) -> None:
        """SIGKILL it and all in the pid namespace that it may have opened; return when they are gone."""
        if (pid := self.pid()) is not None:
            inside = namespace(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait(lambda: self.pid() is None, f"{self.name} (process {pid}) to end", PATIENCE)
            if inside is not None:
                wait(lambda: not members(inside), f"the processes of {self.name} to end", PATIENCE)
        self.pid_file.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The end of its log, on one line."""
        try:
            with self.log.open(errors="replace") as lines:
                return " | ".join(line.strip() for line in deque(lines, 5)) or "it said nothing"
        except OSError:
            return "it has no log"


def living(pid: int) -> str | None:
    """The name of a process; None for one that is dead, be it noticed by its parent or not."""
    try:
        name, rest = Path("/proc", str(pid), "stat").read_text().split("(", 1)[1].rsplit(")", 1)
    except OSError:
        return None
    return name if rest.split()[0] not in "ZX" else None


def namespace(pid: int) -> str | None:
    """The pid namespace that this process holds open for its children; None if that is our own."""
    try:
        inside = os.readlink(f"/proc/{pid}/ns/pid_for_children")
    except OSError:
        return None
    return inside if inside != os.readlink("/proc/self/ns/pid") else None


def members(inside: str) -> list[int]:
    """The living processes of a pid namespace: those that this user may look at, so at least his own."""

    def is_one(pid: int) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/ns/pid") == inside and living(pid) is not None
        except OSError:
            return False

    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and is_one(int(entry))]


def wait(ready: Callable[[], bool], what: str, seconds: float) -> None:
    """Return as soon as ``ready()``; `ClusterError` if that takes longer than ``seconds``."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:g} s for {what}")
        time.sleep(0.05)
