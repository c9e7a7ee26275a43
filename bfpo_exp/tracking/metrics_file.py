"""A run's own record of its metrics: one JSON line per step, only ever appended to."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Entry(NamedTuple):
    """What was measured at one step."""

    step: int
    time: float  # seconds since the epoch
    metrics: dict[str, float]  # may hold NaN and infinities


class MetricsFile:
    """The metrics of one run, ``{"step": .., "time": .., "metrics": {name: value}}`` a line.

    A line is written whole and flushed, so that a killed run loses at most the line that it was
    writing.  Reading never changes the file; the first `append` drops such a torn last line.
    A restarted run recomputes the steps after its checkpoint, and a value that is here already
    is not appended again.  One process appends; any number may read meanwhile.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        self._steps: dict[str, set[int]] = {}  # the steps that each name has

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the values of ``metrics`` at ``step``, less those that are here already."""
        if self._file is None:
            self._file = self._reopen()
        new = {n: float(v) for n, v in metrics.items() if step not in self._steps.get(n, ())}
        if not new:
            return
        line = json.dumps({"step": step, "time": time.time(), "metrics": new})
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._remember(step, new)

    def read(self) -> Iterator[Entry]:
        """Every whole line, in the order of writing; nothing where there is no file."""
        return (entry for _, entry in self.read_from(0))

    def read_from(self, offset: int) -> Iterator[tuple[int, Entry]]:
        """The whole lines from byte ``offset`` on, each with the offset of the line after it."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield offset, Entry(**json.loads(line))

    def last(self) -> dict[str, float]:
        """The value of each name at its last line."""
        return {name: value for entry in self.read() for name, value in entry.metrics.items()}

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _reopen(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        for end, entry in self.read_from(0):
            self._remember(entry.step, entry.metrics)
            whole = end
        file = self.path.open("ab")
        file.truncate(whole)
        return file

    def _remember(self, step: int, names: Mapping[str, float]) -> None:
        for name in names:
            self._steps.setdefault(name, set()).add(step)
