"""A training in a fresh process, one repetition at a time: the parent's handle, and the process itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parents[1]


def environment(**more: str) -> dict[str, str]:
    """Of a process that is measured.

    Without CI, TRL's trainers report themselves to the Hub.  Modules stay compiled, as on most machines.
    """
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**plain, "CI": "true", "HF_HUB_OFFLINE": "1", **more}


class Failed(RuntimeError):
    """A process of a benchmark ended early; holds the end of what it wrote."""


class Worker:
    """A case's process, which starts at once and then does as it is asked, one thing at a time."""

    def __init__(self, case: Case) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(case.to_json())],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ready(self) -> None:
        """Wait until it has imported and read everything."""
        self._line()

    def turn(self) -> dict[str, Any]:
        """Let it do its next turn, and wait for what it tells at the end of it."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._line()

    def stop(self) -> None:
        """End it, wherever it is."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise Failed(self._errors.read()[-4000:])
        return json.loads(line)


def main() -> None:
    """The process: train the case, and tell of it in JSON lines."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is not for the parent
    from dataclasses import asdict

    from benchmarks.cases import Case, Work
    from benchmarks.gate import Gate
    from bfpo_exp.runtime import before_compute

    case = Case(**json.loads(sys.argv[1]))
    before_compute(case.threads)
    if case.side == "ours":
        from benchmarks.ours import run
    else:
        from benchmarks.theirs import run
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BFPO_EXP_HOME"] = folder
        work = Work.of(case, Path(folder))
        gate = Gate(case, sys.stdin, told)
        gate.turn()
        seen = run(case, work, gate)
    gate.tell({**asdict(seen), **work.of_a_step(case), "peak_gb": gate.peak / 1e9})


if __name__ == "__main__":
    main()
