"""The store of reusable results: each is made once, whoever asks for it, however often.

An entry is a folder ``<root>/<kind>/<key>`` where the key is a hash of everything that determines
the content.  It is written under a temporary name and renamed when complete, so an entry that
exists is whole.  One process makes an entry; others that want it wait on its lock and reuse it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

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

    def get(self, kind: str, made_of: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The entry's folder; ``make`` fills an empty folder if there is none yet.

        If ``make`` raises, nothing is left behind and the error goes on.
        """
        entry = self.path(kind, made_of)
        if entry.is_dir():
            return entry
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(entry.parent / f".{entry.name}.lock")
        with _acquired(lock, f"{kind} {entry.name}"):
            if entry.is_dir():
                return entry
            for leftover in entry.parent.glob(f".{entry.name}.making-*"):
                shutil.rmtree(leftover)  # of a process that was killed: the lock is ours now
            making = entry.parent / f".{entry.name}.making-{os.getpid()}"
            making.mkdir()
            try:
                make(making)
                (making / META).write_text(json.dumps(made_of, indent=1, sort_keys=True))
                os.replace(making, entry)
            except BaseException:
                shutil.rmtree(making, ignore_errors=True)
                raise
        return entry
