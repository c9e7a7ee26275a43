"""Where a run ran, and on which code: tags that let a number be traced back."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path

PACKAGES = ("bfpo-exp", "torch", "transformers", "datasets", "deepspeed", "mlflow")
_SLURM = {
    "SLURM_JOB_ID": "slurm.job_id",
    "SLURM_ARRAY_JOB_ID": "slurm.array_job_id",
    "SLURM_ARRAY_TASK_ID": "slurm.array_task_id",
    "SLURM_JOB_NODELIST": "slurm.nodes",
}


def environment_tags() -> dict[str, str]:
    """Tags ``host``, ``git.*``, ``slurm.*`` and ``version.*``; what is not there has no tag."""
    slurm = {tag: os.environ[name] for name, tag in _SLURM.items() if os.environ.get(name)}
    return {"host": socket.gethostname()} | _git() | slurm | _versions()


def _git() -> dict[str, str]:
    """The commit of the checkout that this package lies in, and whether files differ from it."""
    checkout = Path(__file__).resolve().parents[2]
    # An installed package may lie inside somebody else's checkout, whose commit says nothing.
    if _run_git(checkout, "rev-parse", "--show-toplevel") != str(checkout):
        return {}
    commit = _run_git(checkout, "rev-parse", "HEAD")
    if not commit:
        return {}
    dirty = _run_git(checkout, "status", "--porcelain", "--untracked-files=no")
    return {"git.commit": commit, "git.dirty": "true" if dirty else "false"}


def _run_git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"version.python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
