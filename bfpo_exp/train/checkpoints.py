"""Checkpoints of a training stage: whole or not at all, few, and looked over before they are used.

A checkpoint is a folder ``step-<n>``: the engine's files, and ``state.json`` with what the loop
needs and a digest of every file.  It is written under another name and renamed, so a kill (or a
full disk) in the middle leaves the one before it as it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bfpo_exp.distributed import group, told, wait
from bfpo_exp.errors import UserError
from bfpo_exp.train.engine import Engine

log = logging.getLogger(__name__)
STATE = "state.json"
DRAFT = ".draft"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage.

    Attributes:
        folder: where they are.
        every: steps between two of them; None: there are none.
        keep: how many are kept, the latest.
        identity: what the stage is made of; a checkpoint of anything else is refused.
    """

    folder: Path
    every: int | None
    keep: int
    identity: str

    def due(self, taken: int, steps: int) -> bool:
        """Whether to write one after so many steps of all; the last step has its result instead."""
        return self.every is not None and taken % self.every == 0 and taken < steps

    def save(self, engine: Engine, taken: int, progress: Mapping[str, Any]) -> None:
        """Write the checkpoint after ``taken`` steps; ``progress`` (JSON) comes back from `resume`.

        All processes call it together.  Raises `UserError` where it cannot be written, which
        leaves the earlier ones untouched.
        """
        draft, final = self.folder / DRAFT, self.folder / f"step-{taken:09d}"
        try:
            if group().main:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
            wait()
            engine.save(draft)
            wait()
            if group().main:
                state = {
                    "step": taken,
                    "identity": self.identity,
                    "processes": group().size,
                    "progress": dict(progress),
                    "files": {name: _digest(draft / name) for name in _files(draft)},
                }
                _write_through(draft / STATE, json.dumps(state))
                shutil.rmtree(final, ignore_errors=True)
                os.replace(draft, final)
                for old in self._steps()[: -self.keep]:
                    shutil.rmtree(old)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            left = self._steps()
            raise UserError(
                f"cannot write a checkpoint to {self.folder} ({error.strerror or error}); "
                + (f"the one before, {left[-1].name}, is whole" if left else "there is none before it")
                + ": make room and run the same command again"
            ) from None
        wait()

    def resume(self, engine: Engine) -> tuple[int, dict[str, Any]]:
        """Load the latest whole checkpoint: steps taken and progress; (0, {}) if there is none.

        A damaged one is told of and left aside for the one before it.  Raises `UserError` for one
        of another stage, or of another number of processes where the engine cannot do that.
        """
        chosen, state = told(self._latest() if group().main else None) or (None, {})
        if chosen is None:
            return 0, {}
        if state["identity"] != self.identity:
            raise UserError(
                f"{chosen} is a checkpoint of another run ({state['identity']}, this is {self.identity}); "
                "remove it, or choose another runs root"
            )
        if state["processes"] != group().size and not engine.any_world_size:
            raise UserError(
                f"{chosen} was written by {state['processes']} processes, and this run has {group().size}; "
                "with deepspeed a run continues on as many as it began with (remove it to start again)"
            )
        engine.load(chosen)
        if group().main:
            log.info("continuing after step %d", state["step"])
        return state["step"], state["progress"]

    def _latest(self) -> tuple[Path, dict[str, Any]] | None:
        for folder in reversed(self._steps()):
            try:
                state = json.loads((folder / STATE).read_text())
                damaged = [f for f, digest in state["files"].items() if _digest(folder / f) != digest]
            except (OSError, ValueError, KeyError):
                damaged = [STATE]
            if not damaged:
                return folder, state
            log.warning(
                "warning: the checkpoint's file %s is damaged; using an earlier one", folder / damaged[0]
            )
        return None

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_through(path: Path, text: str) -> None:
    """Write a file to the disk itself, not only to the system's memory of it."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
