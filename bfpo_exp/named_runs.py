"""Runs that are there already, found by what a user calls them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bfpo_exp.errors import UserError, unknown
from bfpo_exp.paths import home

CONFIG, STATUS, MODEL = "config.yaml", "status.json", "model"
SHOWN = 6  # digits of a key in a run's name
LATEST = 200  # runs among which the nearest name is looked for


def run_name(label: str, seed: int, key: str) -> str:
    """The name of a run in MLflow and in tables.

    >>> run_name("bfpo", 0, "1a2b3c4d5e6f7a8b")
    'bfpo-s0-1a2b3c'
    """
    return f"{label}-s{seed}-{key[:SHOWN]}"


@dataclass(frozen=True)
class NamedRun:
    """A run's folder, named by its key, and the config in it."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> NamedRun:
        """The run in this folder."""
        return cls(folder, yaml.safe_load((folder / CONFIG).read_text()))

    @property
    def name(self) -> str:
        """The run's name in MLflow."""
        label = self.config["method"] or self.config["loss"]["name"]
        return run_name(label, self.config["seed"], self.folder.name)

    def model(self) -> Path:
        """The folder of the model that the run has made, in the store.

        Raises `UserError` for a run that has not finished, or has no model of its own any more.
        """
        status = self.folder / STATUS
        told = json.loads(status.read_text()) if status.exists() else {"status": "unfinished"}
        if told["status"] != "finished":
            why = f"failed: {told['reason']}" if told["status"] == "failed" else "has not finished"
            raise UserError(f"run {self.name} {why}; finish it first ({self.folder})")
        link = self.folder / MODEL
        if not link.is_symlink():
            raise UserError(
                f"run {self.name} has no model of its own (its stages: {', '.join(self.config['stages'])})"
            )
        if not link.is_dir():
            raise UserError(
                f"the model of run {self.name} is no longer in the store ({link.resolve()}); remove "
                f"{self.folder} and do the run again"
            )
        return link.resolve()


def named_run(given: str) -> NamedRun:
    """The run that is meant: by its folder, its key or the beginning of it, or its name in MLflow.

    Raises `UserError` where there is none, with the nearest name, or several.
    """
    folder = Path(given).expanduser()
    if (folder / CONFIG).is_file():
        return NamedRun.read(folder.resolve())
    row, dash, begin = given.rpartition("-")
    found = [NamedRun.read(path) for path in _folders() if begin and path.name.startswith(begin)]
    found = [run for run in found if not dash or run.name.rpartition("-")[0] == row]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{run.folder.name} ({run.name})" for run in found)
        raise UserError(f"run {given!r} may be any of {several}; give more of its key")
    raise unknown("run", given, [NamedRun.read(path).name for path in _folders()[:LATEST]])


def _folders() -> list[Path]:
    """The folders of all runs, the latest first."""
    there = [file.parent for file in (home() / "run").glob(f"*/{CONFIG}")]
    return sorted(there, key=lambda folder: folder.stat().st_mtime, reverse=True)
