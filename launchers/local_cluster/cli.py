"""The command: ``start``, ``stop``, ``status``, ``env``, ``kill-node``, ``start-node``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from local_cluster.cluster import Cluster, locked, start, stop
from local_cluster.errors import ClusterError
from local_cluster.layout import MOST_GPUS, MOST_NODES, read

PROGRAM = "local_cluster"
NOT_RUNNING = 3  # exit code of ``status``, as of ``systemctl status``


def main(argv: Sequence[str] | None = None) -> int:
    """Do one command; exit code 2 and one line where that cannot be."""
    arguments = parser().parse_args(argv)
    try:
        return int(COMMANDS[arguments.command](arguments) or 0)
    except ClusterError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--root",
        type=lambda text: Path(text).resolve(),
        default=f"{tempfile.gettempdir()}/bfpo-slurm-{os.geteuid()}",
        metavar="DIR",
        help="everything of the cluster, which is named by it (%(default)s)",
    )
    whole = argparse.ArgumentParser(prog=PROGRAM, description="A real SLURM on this machine.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    starting = commands.add_parser("start", parents=[shared], help="start what does not run yet")
    starting.add_argument("--nodes", type=number(1, MOST_NODES), metavar="N", help="of a new cluster (2)")
    starting.add_argument("--gpus", type=number(0, MOST_GPUS), metavar="N", help="fake ones a node (4)")
    commands.add_parser("stop", parents=[shared], help="cancel every job, end and remove everything")
    commands.add_parser(
        "status", parents=[shared], help=f"a line a node; exit code {NOT_RUNNING} if not whole"
    )
    commands.add_parser("env", parents=[shared], help='for a shell: eval "$(... env)"')
    for name, does in (
        ("kill-node", "SIGKILL a node with all that runs on it"),
        ("start-node", "start it again"),
    ):
        commands.add_parser(name, parents=[shared], help=does).add_argument("node", metavar="NODE")
    return whole


def number(least: int, most: int) -> Callable[[str], int]:
    """A type for argparse: a whole number within these bounds."""

    def parsed(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parsed


def do_start(arguments: argparse.Namespace) -> None:
    """``start``."""
    cluster, began = start(arguments.root, arguments.nodes, arguments.gpus)
    layout = cluster.layout
    size = f"{layout.nodes} nodes, {layout.gpus} GPUs each"
    print(f"{'started' if began else 'runs already'}: {size}, in {layout.root}")
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).parent))}"
    print(f'use it: eval "$({command} env --root {shlex.quote(str(layout.root))})"')


def do_stop(arguments: argparse.Namespace) -> None:
    """``stop``."""
    print("stopped" if stop(arguments.root) else f"nothing runs in {arguments.root}")


def do_status(arguments: argparse.Namespace) -> int:
    """``status``."""
    if read(arguments.root) is None:
        print(f"nothing runs in {arguments.root}")
        return NOT_RUNNING
    cluster = running(arguments)
    for name, state in cluster.status().items():
        print(f"{name:<10} {state}")
    return 0 if cluster.whole() else NOT_RUNNING


def do_env(arguments: argparse.Namespace) -> None:
    """``env``."""
    layout = running(arguments).layout
    print(f"export SLURM_CONF={shlex.quote(str(layout.conf))}")
    print(f'export PATH={shlex.quote(str(layout.bin))}:"$PATH"')


def do_kill_node(arguments: argparse.Namespace) -> None:
    """``kill-node``."""
    with locked(arguments.root):
        running(arguments).kill_node(arguments.node)
    print(f"{arguments.node} is dead; SLURM notices within half a minute and requeues its jobs")


def do_start_node(arguments: argparse.Namespace) -> None:
    """``start-node``."""
    with locked(arguments.root):
        running(arguments).start_node(arguments.node)
    print(f"{arguments.node} runs")


def running(arguments: argparse.Namespace) -> Cluster:
    """The cluster in ``--root``; `ClusterError` if there is none."""
    if (layout := read(arguments.root)) is None:
        raise ClusterError(f"no cluster in {arguments.root}; start makes one")
    return Cluster(layout)


COMMANDS = {
    "start": do_start,
    "stop": do_stop,
    "status": do_status,
    "env": do_env,
    "kill-node": do_kill_node,
    "start-node": do_start_node,
}
