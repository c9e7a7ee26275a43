"""A run that is recorded in its own files alone, and sent to MLflow later, by another process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from bfpo_exp.tracking.recorder import Recorder

LATER = "mlflow_later"  # a file beside the run: whoever does it sends nothing


class Later(Recorder):
    """Sends nothing, and leaves word of it: `bfpo_exp.tracking.sync` does.

    Jobs on the nodes of a cluster record so where the store is an SQLite file: its locks do not hold
    on the file systems that nodes share.
    """

    def __init__(self, run_dir: Path, name: str) -> None:
        self.run_dir = run_dir
        self.name = name

    def open(self) -> None:
        """Leave word that this process sends nothing."""
        (self.run_dir / LATER).touch()

    def sync(self) -> None:
        """Nothing to do."""

    def finish(self, status: Literal["FINISHED", "FAILED"], tags: Mapping[str, str] | None = None) -> None:
        """Nothing to do: how the run ended is in its folder."""
