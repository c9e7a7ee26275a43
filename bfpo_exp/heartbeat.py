"""A sign of life beside a run: who does it, where it stands, and that it was so a moment ago."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

HEARTBEAT = "heartbeat.json"
EVERY = 5.0  # seconds between two writings
STALE = 60.0  # seconds after which a process that has not written counts as dead


@dataclass(frozen=True)
class Beat:
    """What a process last said of itself.

    ``step`` of ``steps`` are those of the ``stage``; ``speed`` is in pairs a second, ``left`` the
    seconds to the end of the stage.  None where it is not known.
    """

    host: str
    pid: int
    stage: str = ""
    step: int | None = None
    steps: int | None = None
    speed: float | None = None
    left: float | None = None

    @property
    def here(self) -> bool:
        """Whether the process is one of this machine."""
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        steps = "" if self.step is None else f"step {self.step}" + (f" of {self.steps}" if self.steps else "")
        speed = "" if self.speed is None else f"{self.speed:.3g} pairs/s"
        left = "" if self.left is None else f"{_duration(self.left)} left"
        return ", ".join(part for part in (f"{self.stage} {steps}".strip(), speed, left) if part)


def _duration(seconds: float) -> str:
    """Seconds in the two largest units.

    >>> _duration(12.3), _duration(754), _duration(4000)
    ('12 s', '12 m 34 s', '1 h 6 m')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} m"
    return f"{minutes} m {rest} s" if minutes else f"{rest} s"


def last_beat(folder: Path) -> tuple[Beat, float] | None:
    """What the folder's process last said, and when (seconds since the epoch); None if nothing."""
    file = folder / HEARTBEAT
    try:
        return Beat(**json.loads(file.read_text())), file.stat().st_mtime
    except (FileNotFoundError, ValueError):  # a machine that lost power leaves empty files
        return None


def living(folder: Path) -> Beat | None:
    """The beat of a process that is at work in this folder now."""
    last = last_beat(folder)
    if last is None:
        return None
    beat, at = last
    return beat if time.time() - at < STALE and not (beat.here and _gone(beat.pid)) else None


def _gone(pid: int) -> bool:
    """Whether a process of this machine has ended, if perhaps nobody has taken note of it yet."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except (PermissionError, FileNotFoundError):  # somebody else's, or a system without /proc
        return False
    return state in "ZX"


class Heartbeat:
    """Says so while its block runs, from a thread; the file goes with the block, unless that is interrupted.

    A file that stays behind tells that a process was at work here and came to no end.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / HEARTBEAT
        self._beat = Beat(socket.gethostname(), os.getpid())
        self._began = (0, 0.0)  # the first step that was told of in this stage, and when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="heartbeat", daemon=True)

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self._beat = Beat(self._beat.host, self._beat.pid, stage)

    def at(self, step: int, steps: int | None, speed: float | None) -> None:
        """The stage has taken ``step`` of ``steps`` (None: unknown), at ``speed`` pairs a second."""
        now = time.monotonic()
        if self._beat.step is None:
            self._began = (step, now)
        first, began = self._began
        left = (steps - step) * (now - began) / (step - first) if steps is not None and step > first else None
        self._beat = replace(self._beat, step=step, steps=steps, speed=speed, left=left)

    def __enter__(self) -> Heartbeat:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            self._file.unlink(missing_ok=True)

    def _repeat(self) -> None:
        while not self._over.wait(EVERY):
            self._write()

    def _write(self) -> None:
        draft = self._file.with_name(f".{self._file.name}.draft")
        with contextlib.suppress(OSError):  # a full disk: the run itself will say so
            draft.write_text(json.dumps(asdict(self._beat)))
            os.replace(draft, self._file)
