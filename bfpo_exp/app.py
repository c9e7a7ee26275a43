"""``bfpo-exp``: the Hydra app.  Nothing heavy is imported before a run begins."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING

from bfpo_exp.errors import UserError
from bfpo_exp.paths import HOME_VARIABLE, config_dir, home
from bfpo_exp.runtime import before_imports

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Compose, check, run; a bad input ends in one line and exit code 2."""
    before_imports()
    import hydra

    traceback_wanted = bool(os.environ.get("HYDRA_FULL_ERROR"))
    # Hydra would print errors its own way, in several lines; with this it hands them on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(_single)()
        code = _conclude()
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


class _BadInput(BaseException):
    """Carries a `UserError` past Hydra, which would add lines of its own to an `Exception`."""

    def __init__(self, error: UserError) -> None:
        self.error = error


def _told(error: object) -> int:
    print(f"bfpo-exp: {error}", file=sys.stderr)
    return 2


def _single(composed: DictConfig) -> None:
    """One run, as Hydra calls it."""
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
        uri = prepare(config.tracking, root)
        preflight(config)
    except UserError as error:
        raise _BadInput(error) from None
    outcome = run(config, uri)
    print(f"{config.label}, seed {config.seed}: {outcome}")
    print(f"  {outcome.run_dir}")
    if outcome.report:
        print(outcome.report)
    if outcome.status == "failed":
        sys.exit(1)


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
