"""Jobs of a sweep, done from their frozen configs, in whatever process and on whatever machine.

    python -m bfpo_exp.sweep.job SWEEP_DIR NUMBER...
    python -m bfpo_exp.sweep.job SWEEP_DIR --only base,sft NUMBER...

The second form makes what those jobs share of the named stages, and does no run; if that cannot be
made, they have all failed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from filelock import Timeout

from bfpo_exp import progress
from bfpo_exp.config.schema import Config, Stage
from bfpo_exp.distributed import ask_to_stop, ending, group, leave, lost_another
from bfpo_exp.errors import UserError, unknown
from bfpo_exp.paths import home
from bfpo_exp.run import OTHER_FAILURE, VANISHED, Outcome, give_up, make_ahead, run, run_code, run_key
from bfpo_exp.runtime import before_imports
from bfpo_exp.sweep.manifest import Manifest, write_whole
from bfpo_exp.sweep.state import Ending
from bfpo_exp.tracking.store import resolve

log = logging.getLogger(__name__)
LOG = "job.log"
LAST_WORDS = 2.0  # seconds that a process which was interrupted waits for the main one
BUSY_SECONDS = 2.0  # until a run that another process does is asked for again


def do(manifest: Manifest, number: int, *, wait: bool = True) -> Outcome:
    """Do one job and keep how it ended; an error of any kind is its outcome, and is not raised.

    Without ``wait``, `filelock.Timeout` is raised where another process does the same run.
    """
    folder = manifest.job_dir(number)
    try:
        with _printing_to(folder / (LOG if group().main else f"job.{group().rank}.log")):
            outcome = _done(manifest, number, wait)
    except Timeout:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        outcome = Outcome("failed", {}, manifest.run_dir(number), 0.0, " ".join(reason.split()))
    _keep(manifest, number, outcome)
    return outcome


def _done(manifest: Manifest, number: int, wait: bool) -> Outcome:
    if run_code() != manifest.code:
        raise UserError(
            f"the code has changed since the sweep began, so this would be another run; restore it, or go on "
            f"with `bfpo-sweep resume {manifest.name} --force`"
        )
    config = manifest.config(number)
    if group().main:  # another kind of device than where the sweep was written down gives another key
        manifest.link(number, run_key(config))
    uri = _destination(manifest, config)
    return run(config, uri, manifest.parent_id, wait=wait or group().size > 1)


def _destination(manifest: Manifest, config: Config) -> str | None:
    """Where a job sends what it records; None where that is done later, by `bfpo_exp.tracking.sync`.

    Nodes leave an SQLite file alone, whose locks do not hold on file systems that nodes share.
    """
    uri = resolve(config.tracking.uri, home())
    return None if manifest.launcher["name"] == "slurm" and uri.startswith("sqlite:") else uri


def died(manifest: Manifest, number: int, reason: str) -> Outcome:
    """Record as failed a job whose process died and could not say so itself."""
    config = manifest.config(number)
    outcome = give_up(config, _destination(manifest, config), manifest.parent_id, reason)
    _keep(manifest, number, outcome)
    return outcome


def _keep(manifest: Manifest, number: int, outcome: Outcome) -> None:
    if outcome.reason.startswith(VANISHED):  # who started the processes sees what has become of it
        return
    with contextlib.suppress(OSError):  # a full disk: the job counts as lost, and is done again
        if group().main:
            Ending(outcome.status, outcome.seconds, outcome.reason).save(manifest.job_dir(number))
        elif outcome.status == "failed" and not (file := manifest.run_dir(number) / OTHER_FAILURE).exists():
            write_whole(file, f"process {group().rank}: {outcome.reason}")


@contextlib.contextmanager
def _printing_to(file: Path) -> Iterator[None]:
    """What this process and its libraries print goes to the file; warnings also where it went before."""
    before = [os.dup(1), os.dup(2)]
    terminal = logging.StreamHandler(os.fdopen(os.dup(2), "w"))
    terminal.setLevel(logging.WARNING)
    logging.getLogger("bfpo_exp").addHandler(terminal)
    try:
        with file.open("ab") as target:
            _point_output_to(target.fileno(), target.fileno())
        yield
    finally:
        _point_output_to(*before)
        logging.getLogger("bfpo_exp").removeHandler(terminal)
        terminal.stream.close()
        for descriptor in before:
            os.close(descriptor)


def _point_output_to(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


def set_up() -> None:
    """Make this process one that does jobs: it logs, and draws no bars."""
    before_imports()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("bfpo_exp").setLevel(logging.INFO)
    progress.silence()


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """A SIGTERM interrupts what is done in here, and so does SLURM's word that a job's time is nearly up.

    A second one finds it on its way out already.
    """

    def interrupted(number: int, frame: object) -> None:
        for signalled in before:
            signal.signal(signalled, signal.SIG_IGN)
        ask_to_stop()

    before = {number: signal.signal(number, interrupted) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def do_in_turn(manifest: Manifest, numbers: Sequence[int]) -> int:
    """Do jobs one after another; those that other processes do come last.  Gives the number of failures.

    A sweep that is cancelled meanwhile has no further job begun.
    """
    left, failed, busy = deque(numbers), 0, 0
    while left and not manifest.cancelled:
        number = left.popleft()
        try:
            outcome = do(manifest, number, wait=False)
        except Timeout:
            left.append(number)
            busy += 1
            if busy >= len(left):  # all that is left
                time.sleep(BUSY_SECONDS)
            continue
        busy = 0
        failed += outcome.status == "failed"
        log.info("job %d, %s: %s", number, manifest.job(number).name, outcome)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if a job failed, 2 for a bad input, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m bfpo_exp.sweep.job", description="Do jobs of a sweep.")
    parser.add_argument("sweep", metavar="SWEEP_DIR", type=Path)
    parser.add_argument("numbers", metavar="NUMBER", type=int, nargs="+")
    parser.add_argument("--only", metavar="STAGES", help="make what these stages share, such as base,sft")
    arguments = parser.parse_args(argv)
    set_up()
    try:
        manifest = Manifest.load(arguments.sweep.absolute())
        with sigterm_interrupts():
            if arguments.only is None:
                return int(do_in_turn(manifest, arguments.numbers) > 0)
            return _make_ahead(manifest, arguments.numbers, _stages(arguments.only))
    except UserError as error:
        print(f"bfpo-sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not group().main:  # else the main process, which hears of it too, may take it for a failure
            time.sleep(LAST_WORDS)
        return 130
    finally:
        leave()


def _make_ahead(manifest: Manifest, numbers: Sequence[int], stages: Sequence[Stage]) -> int:
    """Make what these jobs share; a failure is theirs.  The exit code."""
    try:
        make_ahead(manifest.config(numbers[0]), stages)
    except Exception as error:
        log.exception("cannot make what jobs share")
        if lost_another(error):
            return 1
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        reason = f"what it shares with other jobs ({','.join(stages)}) failed: {' '.join(why.split())}"
        for number in numbers:
            if Ending.of(manifest.job_dir(number)) is None:  # the first process to fail knows why
                Ending("failed", 0.0, reason).save(manifest.job_dir(number))
        return 1
    return 0


def _stages(given: str) -> list[Stage]:
    stages: dict[str, Stage] = {stage: stage for stage in get_args(Stage)}
    if wrong := [name for name in given.split(",") if name not in stages]:
        raise unknown("stage", wrong[0], stages)
    return [stages[name] for name in given.split(",")]


if __name__ == "__main__":
    with ending():
        sys.exit(main())
