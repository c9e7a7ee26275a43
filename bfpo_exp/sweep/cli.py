"""The command ``bfpo-sweep``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from bfpo_exp.errors import UserError
from bfpo_exp.runtime import before_imports
from bfpo_exp.sweep.manifest import RUN_LINK, Manifest, find, sweeps

WATCH_SECONDS = 2.0
LOGS = ("job.log", f"{RUN_LINK}/artifacts/traceback.txt")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for a bad input; `resume` ends like the sweep itself."""
    before_imports()
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.do(arguments)
    except UserError as error:
        print(f"bfpo-sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bfpo-sweep", description="Sweeps: how they stand, going on with one, ending one."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("list", help="every sweep, the latest first").set_defaults(do=_list)
    status = _on_sweep(commands, "status", "how each job stands", _status)
    status.add_argument("--watch", action="store_true", help="again and again, until the sweep ends")
    resume = _on_sweep(commands, "resume", "do what is not done, from the checkpoints on", _resume)
    resume.add_argument("--force", action="store_true", help="although the code has changed since")
    _on_sweep(commands, "sync", "send MLflow what it lacks of the runs", _sync)
    _on_sweep(commands, "cancel", "interrupt its runs and begin no more of them", _cancel)
    logs = commands.add_parser("logs", help="what a job has printed, and why it failed")
    logs.add_argument("sweep", nargs="?", metavar="SWEEP", help="name or folder; default: the latest")
    logs.add_argument("job", type=int, metavar="JOB", help="its number")
    logs.set_defaults(do=_logs)
    return parser


def _on_sweep(
    commands: argparse._SubParsersAction, name: str, what: str, do: object
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what)
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="name or folder; default: the latest")
    parser.set_defaults(do=do)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from bfpo_exp.sweep.show import sweep_line

    for manifest in sweeps():
        print(sweep_line(manifest))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from bfpo_exp.sweep.show import print_status, watch

    manifest = find(arguments.sweep)
    every = WATCH_SECONDS
    if manifest.launcher["name"] == "slurm":
        from bfpo_exp.sweep.slurm import POLL, look_after

        look_after(manifest)
        every = POLL
    if arguments.watch:
        watch(manifest, every)
    print_status(manifest)
    return 0


def _resume(arguments: argparse.Namespace) -> int:
    from bfpo_exp.sweep.control import resume

    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("bfpo_exp").setLevel(logging.INFO)
    return resume(find(arguments.sweep), arguments.force)


def _sync(arguments: argparse.Namespace) -> int:
    from bfpo_exp.sweep.state import job_states
    from bfpo_exp.tracking.sync import sync

    manifest = find(arguments.sweep)
    lacking = sync(manifest, job_states(manifest), wait=True)
    what = f"{lacking} runs could not be sent" if lacking else "MLflow has all there is"
    print(f"sweep {manifest.name}: {what}")
    return int(lacking > 0)


def _cancel(arguments: argparse.Namespace) -> int:
    from bfpo_exp.sweep.control import cancel

    manifest = find(arguments.sweep)
    cancel(manifest)
    print(f"sweep {manifest.name} is cancelled; go on with it: bfpo-sweep resume {manifest.name}")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    manifest: Manifest = find(arguments.sweep)
    folder = manifest.job_dir(manifest.job(arguments.job).number)
    files = [folder / name for name in LOGS if (folder / name).exists()]
    if manifest.launcher["name"] == "slurm":
        from bfpo_exp.sweep.slurm_jobs import logs

        files = [*logs(manifest, arguments.job), *files]
    for file in files:
        print(f"==> {file}\n{file.read_text(errors='replace')}")
    if not files:
        print(f"job {arguments.job} of the sweep {manifest.name} has not begun")
    return 0
