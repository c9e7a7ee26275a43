"""``bfpo-exp``: the Hydra app.  Nothing heavy is imported before a run begins."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import traceback
from contextlib import nullcontext
from typing import TYPE_CHECKING

from bfpo_exp.distributed import ask_to_stop, ending, group
from bfpo_exp.errors import UserError
from bfpo_exp.paths import HOME_VARIABLE, config_dir, home
from bfpo_exp.plan.dry_run import FLAG, without_traces
from bfpo_exp.runtime import before_imports

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig

    from bfpo_exp.config.schema import Config
    from bfpo_exp.run import Outcome

log = logging.getLogger(__name__)


def main() -> None:
    """The command as a process of its own: `command`."""
    with ending():
        command()


def command() -> None:
    """Compose, check, run; a bad input ends in one line and exit code 2.  Raises `SystemExit`."""
    before_imports()
    import hydra

    # DeepSpeed's launcher says it on the command line as well as in the environment.
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]
    if group().size > 1:
        _join_in()
    traceback_wanted = bool(os.environ.get("HYDRA_FULL_ERROR"))
    # Hydra would print errors its own way, in several lines; with this it hands them on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    dry = FLAG in sys.argv
    planned: list[Config] = []
    task = _collected(planned) if dry else _single
    try:
        with without_traces() if dry else nullcontext():
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(task)()
        code = _print_plans(planned) if dry else _conclude()
    except _BadInput as bad:
        code = _told(bad.error)
    except KeyboardInterrupt:
        print("bfpo-exp: interrupted; the same command continues from what is done", file=sys.stderr)
        code = 130
    except Exception as error:
        line = _explained(error)
        if traceback_wanted or line is None:
            raise
        code = _told(line)
    sys.exit(code)


def _join_in() -> None:
    """Set up one of several processes that do a run together: the main one alone speaks.

    The launcher ends the others with a signal when one of them fails; it becomes an interruption, after
    the step that is being taken, which the run records.
    """

    from bfpo_exp import progress

    signal.signal(signal.SIGTERM, lambda number, frame: ask_to_stop())
    if not group().main:
        aside = tempfile.mkdtemp()  # for what Hydra writes of every process
        sys.argv += ["hydra.output_subdir=null", f"hydra.run.dir={aside}", f"hydra.sweep.dir={aside}"]
        logging.disable(logging.WARNING)
        progress.silence()


class _BadInput(BaseException):
    """Carries a `UserError` past Hydra, which would add lines of its own to an `Exception`."""

    def __init__(self, error: UserError) -> None:
        self.error = error


def _told(error: object) -> int:
    print(f"bfpo-exp: {error}", file=sys.stderr)
    return 2


def _single(composed: DictConfig) -> None:
    """One run, as Hydra calls it."""
    from bfpo_exp import distributed
    from bfpo_exp.config.check import checked
    from bfpo_exp.paths import writable_home

    try:
        config = checked(composed)
        root = writable_home()

        from bfpo_exp.preflight import preflight
        from bfpo_exp.run import run
        from bfpo_exp.runtime import before_compute
        from bfpo_exp.tracking.store import prepare

        before_compute(config.threads)
        distributed.join()
        uri = prepare(config.tracking, root) if group().main else ""
        preflight(config)
    except UserError as error:
        raise _BadInput(error) from None
    _tell_of_gpus()
    outcome = run(config, uri)
    if group().main:
        _tell(config, outcome)
    distributed.leave()
    if outcome.status == "failed":
        sys.exit(1)


def _tell_of_gpus() -> None:
    """How to use the GPUs that one process leaves idle."""
    import torch

    if (gpus := torch.cuda.device_count()) > 1 and group().size == 1:
        log.info(
            "%d GPUs are visible and this run uses one of them; for all: torchrun --nproc-per-node %d "
            "-m bfpo_exp %s",
            gpus, gpus, " ".join(sys.argv[1:]),
        )  # fmt: skip


def _tell(config: Config, outcome: Outcome) -> None:
    print(f"{config.label}, seed {config.seed}: {outcome}")
    print(f"  {outcome.run_dir}")
    if outcome.report:
        print(outcome.report)


def _collected(configs: list[Config]) -> Callable[[DictConfig], None]:
    """What Hydra calls for each job of a dry run: the checked config is kept."""

    def collect(composed: DictConfig) -> None:
        from bfpo_exp.config.check import checked

        try:
            configs.append(checked(composed))
        except UserError as error:
            raise _BadInput(error) from None

    return collect


def _print_plans(configs: list[Config]) -> int:
    """What a dry run ends in; nothing where Hydra only answered a question (``--help``)."""
    if configs:
        from bfpo_exp.plan.report import plans
        from bfpo_exp.runtime import before_compute

        before_compute(configs[0].threads)
        print(plans(configs))
    return 0


def _conclude() -> int:
    """What a sweep that ran in this process has to say; nothing where there was none."""
    ending = sys.modules.get("bfpo_exp.sweep.ending")
    return ending.conclude() if ending else 0


def _explained(error: Exception) -> object | None:
    """What an error says to the user; None for one that is a defect and deserves its traceback."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, UserError):
        return error
    if isinstance(error, HydraException | OmegaConfBaseException | MissingConfigException):
        from bfpo_exp.config.explain import explain

        return explain(error)
    if isinstance(error, OSError) and str(error.filename).startswith(str(home())):
        return (
            f"cannot write to the runs root {home()} ({error.strerror}); set {HOME_VARIABLE} to a folder "
            "that can be written"
        )
    if isinstance(error, ValueError) and _raised_in_hydra(error):  # its own flags, or a group set to null
        return " ".join(str(error).split())
    return None


def _raised_in_hydra(error: Exception) -> bool:
    """Whether an error comes from Hydra's own reading of the command line and the configs."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.sep}hydra{os.sep}_internal{os.sep}" in frames[-1].filename
