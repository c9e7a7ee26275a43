"""Runs one run that is killed again and again, each time in a child that is forked from here.

    python kill_support.py ENGINE KILLS

A child kills itself (SIGKILL) at a random optimisation step, or half-way through writing a
checkpoint.  Forking saves the imports of every new start.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 90
ARGUMENTS = [
    "experiment=smoke",
    f"train.steps={STEPS}",
    "train.log_every=3",
    "train.checkpoint_every=4",
    "train.base.steps=12",
    "train.base.checkpoint_every=3",
]


def configured(engine: str) -> Any:
    from hydra import compose, initialize_config_dir

    from bfpo_exp.config.check import checked
    from bfpo_exp.paths import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return checked(compose("config", [*ARGUMENTS, f"deepspeed={engine}"]))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_a_step(number: int) -> None:
    """Die before the ``number``-th update of this process, in whatever stage that is."""
    from bfpo_exp.train.deepspeed import ZeroEngine
    from bfpo_exp.train.engine import PlainEngine

    taken = 0
    for engine in (PlainEngine, ZeroEngine):

        def counted(self: Any, real: Callable[..., Any] = engine.step) -> Any:
            nonlocal taken
            taken += 1
            if taken == number:
                die()
            return real(self)

        engine.step = counted  # type: ignore[method-assign]


def kill_inside_a_save(number: int) -> None:
    """Die when the ``number``-th checkpoint of this process has half its bytes."""
    from bfpo_exp.train.deepspeed import ZeroEngine
    from bfpo_exp.train.engine import PlainEngine

    written = 0
    for engine in (PlainEngine, ZeroEngine):

        def torn(self: Any, folder: Path, real: Callable[..., Any] = engine.save) -> None:
            nonlocal written
            real(self, folder)
            written += 1
            if written == number:
                for file in (path for path in folder.rglob("*") if path.is_file()):
                    os.truncate(file, file.stat().st_size // 2)
                die()

        engine.save = torn  # type: ignore[method-assign]


def child(engine: str, sabotage: Callable[[], None]) -> int:
    """Do the run in a fork; its exit status, or the negative number of the signal that ended it."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        sabotage()
        from bfpo_exp.paths import writable_home
        from bfpo_exp.run import run
        from bfpo_exp.tracking.store import prepare

        config = configured(engine)
        outcome = run(config, prepare(config.tracking, writable_home()))
        print(outcome.status, outcome.reason, flush=True)
        os._exit(outcome.status != "finished")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    engine, kills = sys.argv[1], int(sys.argv[2])
    import transformers  # noqa: F401

    import bfpo_exp.run  # noqa: F401

    if engine != "none":
        import deepspeed  # noqa: F401
    draw = random.Random(0)
    for kill in range(kills):
        sabotage = kill_inside_a_save if kill % 3 == 2 else kill_at_a_step
        number = draw.randrange(2, 5) if kill % 3 == 2 else draw.randrange(2, 12)
        status = child(engine, lambda s=sabotage, n=number: s(n))
        assert status in (-signal.SIGKILL, 0), status
        if status == 0:
            raise SystemExit(f"the run had finished before kill {kill}")
    assert child(engine, lambda: None) == 0


if __name__ == "__main__":
    main()
