"""A sweep on this machine: its jobs shared out over warm worker processes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from filelock import FileLock, Timeout

from bfpo_exp.errors import UserError
from bfpo_exp.heartbeat import Heartbeat, last_beat
from bfpo_exp.progress import progress
from bfpo_exp.run import Outcome
from bfpo_exp.sweep.ending import interrupted
from bfpo_exp.sweep.job import sigterm_interrupts
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.workers import do_all, shares

log = logging.getLogger(__name__)


def drive(manifest: Manifest, numbers: Sequence[int]) -> dict[int, Outcome]:
    """Do jobs of a sweep; one that fails keeps no other from running.

    The outcomes of those that were done: all, unless ``fail_fast`` left some out.  An interruption
    ends the workers, and the sweep's MLflow run as KILLED, and is raised again.
    """
    n_jobs, retries, fail_fast = (manifest.launcher[name] for name in ("n_jobs", "retries", "fail_fast"))
    outcomes: dict[int, Outcome] = {}
    with _alone_with(manifest), sigterm_interrupts(), progress("sweep", len(numbers)) as advance:
        places = shares(n_jobs, (manifest.config(number) for number in numbers))
        log.info("sweep %s: %d runs, %d at a time", manifest.name, len(numbers), len(places))
        try:
            with contextlib.closing(do_all(manifest, numbers, places, retries, fail_fast)) as done:
                for number, outcome in done:
                    outcomes[number] = outcome
                    name = manifest.job(number).name
                    log.info("[%d/%d] %s: %s", len(outcomes), len(numbers), name, outcome)
                    advance(1)
        except KeyboardInterrupt:
            interrupted(manifest)
            raise
    return outcomes


@contextlib.contextmanager
def _alone_with(manifest: Manifest) -> Iterator[None]:
    """No other process shares out this sweep's jobs meanwhile, and any can see that this one does."""
    try:
        with FileLock(manifest.folder / ".lock", timeout=0), Heartbeat(manifest.folder):
            yield
    except Timeout:
        last = last_beat(manifest.folder)
        who = f"process {last[0].pid} on {last[0].host}" if last else "another process"
        raise UserError(f"the sweep {manifest.name} is being done already, by {who}") from None
