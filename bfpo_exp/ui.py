"""The command ``bfpo-ui``: MLflow's dashboard on the store of the runs root."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from bfpo_exp.errors import UserError
from bfpo_exp.paths import home

LOOPBACK = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> int:
    """Become the server; exit code 2 and one line where that cannot be."""
    parser = argparse.ArgumentParser(prog="bfpo-ui", description="MLflow's dashboard of every run.")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="interface to listen on; beyond loopback, whoever reaches it can read and change the runs",
    )
    arguments = parser.parse_args(argv)
    try:
        from bfpo_exp.tracking.client import quieten
        from bfpo_exp.tracking.store import existing

        root = home()
        uri = existing("sqlite", root)
        check_port(arguments.host, arguments.port)
    except UserError as error:
        print(f"bfpo-ui: {error}", file=sys.stderr)
        return 2
    quieten()
    # The server can also run background jobs of its own, for which nothing here has any use.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # deprecations inside MLflow
    print(f"dashboard of {root}: http://{arguments.host}:{arguments.port} (Ctrl-C ends it)", flush=True)
    command = server_command(uri, root, arguments.host, arguments.port)
    os.execv(command[0], command)


def check_port(host: str, port: int) -> None:
    """See that a server may listen there; `UserError` where the port is taken or not allowed."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port} ({reason}); set another --port or --host") from None


def server_command(uri: str, root: Path, host: str, port: int) -> list[str]:
    """MLflow's server with one worker, which is plenty for one person and starts soonest."""
    options = {
        "--backend-store-uri": uri,
        "--default-artifact-root": str(root / "mlartifacts"),
        "--host": host,
        "--port": str(port),
        "--workers": "1",
        "--uvicorn-opts": "--log-level=warning",  # not a line for each request
    }
    return [sys.executable, "-m", "mlflow", "server", *(part for pair in options.items() for part in pair)]


if __name__ == "__main__":
    sys.exit(main())
