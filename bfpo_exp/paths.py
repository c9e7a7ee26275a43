"""Where things are: the root of everything a run writes, and the configs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bfpo_exp.errors import UserError

HOME_VARIABLE = "BFPO_EXP_HOME"


def home() -> Path:
    """The root under which everything is written: ``$BFPO_EXP_HOME``, or ``./runs``."""
    return Path(os.environ.get(HOME_VARIABLE) or "runs").absolute()


def writable_home() -> Path:
    """`home`, made if need be and seen to take a file; a `UserError` where it does not."""
    root = home()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the runs root {root} ({error.strerror}); "
            f"set {HOME_VARIABLE} to a folder that can be written"
        ) from None
    return root


def config_dir() -> Path:
    """The folder of configs: ``conf/`` of a checkout, or its copy inside an installed wheel."""
    package = Path(__file__).parent
    checkout = package.parent / "conf"
    return checkout if (checkout / "config.yaml").is_file() else package / "conf"
