"""``--dry-run``: the command composes and checks its configs, prints plans and leaves nothing behind."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

FLAG = "--dry-run"
# Jobs are to come back to this process one after another, whatever would do them.
LAUNCHER = ("hydra/launcher=", "hydra.launcher.", "+hydra.launcher.", "++hydra.launcher.")


@contextmanager
def without_traces() -> Iterator[None]:
    """The command line without `FLAG`, under which Hydra writes nothing but into a folder that is removed."""
    given = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = arguments(given, folder)
        try:
            yield
        finally:
            sys.argv = given


def arguments(given: Sequence[str], folder: str) -> list[str]:
    """The words of a command line that Hydra gets for a dry run.

    >>> arguments(["bfpo-exp", "--dry-run", "-m", "seed=0,1", "hydra/launcher=slurm"], "/tmp/x")[:3]
    ['bfpo-exp', '-m', 'seed=0,1']
    """
    kept = [word for word in given if word != FLAG and not word.startswith(LAUNCHER)]
    nowhere = [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", "hydra.output_subdir=null"]
    return [*kept, "hydra/launcher=basic", *nowhere]
