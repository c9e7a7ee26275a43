"""What the machine has to offer: SLURM's programs, and namespaces to make nodes of."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sinfo": "slurm-client"}
TRIAL = 10.0  # seconds to make a node that does nothing


def program(name: str) -> str:
    """Path of a program, also from sbin, which is not in an ordinary user's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or name


def unavailable() -> str | None:
    """Why no cluster can be started on this machine, in one line; None if it can."""
    if lacking := [package for name, package in PACKAGES.items() if not shutil.which(program(name))]:
        return f"SLURM is not installed: apt-get install --no-install-recommends {' '.join(lacking)}"
    try:
        tried = subprocess.run(
            [*in_a_node("n1"), "/bin/true"], capture_output=True, text=True, timeout=TRIAL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"a node needs namespaces, and unshare cannot be used ({error})"
    if tried.returncode:
        return f"a node needs namespaces, which this machine denies ({' '.join(tried.stderr.split())})"
    return None


def in_a_node(name: str, hosts: Path = Path("/etc/hosts")) -> list[str]:
    """A command line's beginning: what follows runs in a node, whose end is the end of all that runs there.

    A node has process ids, a host name and an /etc/hosts of its own.  Its process 1 is the shell, not
    slurmd, which would leave the jobs' dead processes lying about.  An ordinary user may make these
    where he is root, which is in a user namespace; in another one inside that he is himself again.
    """
    itself = f"--user --map-user={os.geteuid()} --map-group={os.getegid()}".split() if os.geteuid() else []
    return [
        *("unshare", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", "--uts"),
        *(("--user", "--map-root-user") if itself else ()),
        # Without the exit at its end the shell would become the program instead of waiting for it.
        *("sh", "-ec", 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; "$@"; exit', name, str(hosts)),
        *(("unshare", *itself) if itself else ()),
    ]
