"""Runs as processes of their own, as a user starts and kills them, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """``bfpo-exp`` with a runs root, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "bfpo_exp", *arguments],
        env={**os.environ, "BFPO_EXP_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it printed; it must end with this exit code."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, err
    return out


def entries(home: Path) -> list[dict[str, Any]]:
    """The whole lines of the metrics file of a runs root's only run."""
    (file,) = (home / "run").glob("*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def numbers(home: Path) -> dict[tuple[str, int], float]:
    """Its metrics by name and step, without those that measure time."""
    return {
        (name, entry["step"]): value
        for entry in entries(home)
        for name, value in entry["metrics"].items()
        if not name.startswith("perf/")
    }
