"""A real MLflow server for tests, which may be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Server:
    """An MLflow server at one address, whose store outlives it."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        """Start it; returns when it answers."""
        store = ["--backend-store-uri", f"sqlite:///{self._folder / 'server.db'}"]
        files = ["--artifacts-destination", str(self._folder / "files"), "--workers", "1"]
        at = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *at, *store, *files],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", self.port)) != 0:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)

    def down(self) -> None:
        """SIGKILL it."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that runs, and ends with the test."""
    made = Server(tmp_path)
    made.up()
    yield made
    made.down()
