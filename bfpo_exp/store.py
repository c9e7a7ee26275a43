"""The store of reusable results: each is made once, whoever asks for it, however often.

An entry is a folder ``<root>/<kind>/<key>`` where the key is a hash of everything that determines
the content.  It is written under a temporary name and renamed when complete, so an entry that
exists is whole.  One process makes an entry; others that want it wait on its lock and reuse it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from bfpo_exp.distributed import alone, group, told, wait
from bfpo_exp.hashing import stable_hash

log = logging.getLogger(__name__)
META = "made_of.json"


def _acquired(lock: FileLock, what: str) -> AcquireReturnProxy:
    """The lock, taken; waiting for another process is said once."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that makes %s", what)
        return lock.acquire()


class Store:
    """Content-addressed folders under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, made_of: Mapping[str, Any]) -> Path:
        """Where the entry made of these inputs is, or will be."""
        return self.root / kind / stable_hash(made_of)

    def get(
        self,
        kind: str,
        made_of: Mapping[str, Any],
        make: Callable[[Path], None],
        *,
        together: bool = False,
        resumable: bool = False,
    ) -> Path:
        """The entry's folder; ``make`` fills an empty folder if there is none yet.

        Where several processes do a run, all of them ask at the same time.  ``make`` is called in
        the main one, or with ``together`` in all, of which the main one alone is to write.

        If ``make`` raises, nothing is left behind and the error goes on.  With ``resumable`` what is
        there stays, and the next ``make`` of this entry finds it, after a kill too.
        """
        if group().main:
            return self._get(kind, made_of, make, together, resumable)
        making = told(None)  # where the main process makes the entry; None: it is there
        if making is not None:
            if together:
                make(Path(making))
            wait()
        return self.path(kind, made_of)

    def _get(
        self,
        kind: str,
        made_of: Mapping[str, Any],
        make: Callable[[Path], None],
        together: bool,
        resumable: bool,
    ) -> Path:
        entry = self.path(kind, made_of)
        if entry.is_dir():
            told(None)
            return entry
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(entry.parent / f".{entry.name}.lock")
        with _acquired(lock, f"{kind} {entry.name}"):
            if entry.is_dir():
                told(None)
                return entry
            making = entry.parent / f".{entry.name}.making"
            if not resumable:  # what is there is of a process that was killed: the lock is ours now
                shutil.rmtree(making, ignore_errors=True)
            making.mkdir(exist_ok=True)
            told(str(making))
            try:
                with contextlib.nullcontext() if together else alone():
                    make(making)
                (making / META).write_text(json.dumps(made_of, indent=1, sort_keys=True))
                os.replace(making, entry)
            except BaseException:
                if not resumable:
                    shutil.rmtree(making, ignore_errors=True)
                raise
            wait()
        return entry
