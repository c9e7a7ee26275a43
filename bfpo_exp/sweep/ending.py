"""How a sweep ends: its table and plot, in the terminal and on the parent run."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bfpo_exp.paths import home
from bfpo_exp.run import show_in
from bfpo_exp.stages.pipeline import REPORT
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.state import DONE, JobState, job_states, summary, unfinished
from bfpo_exp.tracking.parent import finish_parent, has_child
from bfpo_exp.tracking.store import resolve

log = logging.getLogger(__name__)
FAILURES_SHOWN = 20
_noted: dict[Path, Manifest] = {}


def note(manifest: Manifest) -> None:
    """Remember a sweep that runs in this process until it ends."""
    _noted[manifest.folder] = manifest


def conclude() -> int:
    """Print and record the comparison of each sweep that ran here; the exit code: 1 if a job is not done."""
    codes = [concluded(Manifest.load(folder)) for folder in _noted]
    _noted.clear()
    return max(codes, default=0)


def concluded(manifest: Manifest) -> int:
    """Print and record the comparison of a sweep's runs, and end its MLflow run; the exit code."""
    from bfpo_exp.compare.render import show
    from bfpo_exp.compare.report import sweep_report

    uri = _uri(manifest)
    states = job_states(manifest)
    unsent = _send_what_is_missing(manifest, [state.number for state in states if state.state in DONE])
    table, files = sweep_report(uri, manifest.experiment, manifest.parent_id, manifest.folder / "comparison")
    for state in states:
        report = manifest.run_dir(state.number) / "artifacts" / REPORT
        if state.state in DONE and report.exists():
            print(f"{_shown(report.parents[1])}\n{report.read_text()}\n")
    print(table) if isinstance(table, str) else show(table)
    left = unfinished(states)
    finish_parent(uri, manifest.parent_id, files, "FAILED" if left else "FINISHED")
    _print_counts(manifest, states)
    if files:
        print(f"table and plot: {_shown(files[0].parent)} ({', '.join(f.name for f in files)})")
        print(f"table again:    {command('bfpo-compare')} {manifest.name}")
    if left:
        print(f"do the rest:    {command('bfpo-sweep')} resume {manifest.name}")
    elif unsent:
        print(
            f"not yet in MLflow: {unsent} runs; to send them: {command('bfpo-sweep')} resume {manifest.name}"
        )
    print(f"dashboard:      {command('bfpo-ui')}")
    return 1 if left else 0


def _send_what_is_missing(manifest: Manifest, numbers: Sequence[int]) -> int:
    """Send what MLflow lacks of finished runs, if it was away when they ended; how many it still lacks."""
    uri, parent_id = _uri(manifest), manifest.parent_id
    missing = [number for number in numbers if not has_child(uri, parent_id, manifest.run_dir(number))]
    for sent, number in enumerate(missing):
        show_in(manifest.config(number), uri, parent_id, manifest.run_dir(number))
        if not has_child(uri, parent_id, manifest.run_dir(number)):  # the others would wait in vain, too
            return len(missing) - sent
    return 0


def _print_counts(manifest: Manifest, states: Sequence[JobState]) -> None:
    reused = sum(state.state == "reused" for state in states)
    failed = [state for state in states if state.state == "failed"]
    undone = len(unfinished(states)) - len(failed)
    runs = f"{len(states)} run{'s' if len(states) > 1 else ''}"
    not_done = f", {undone} not done" if undone else ""
    print(f"\n{runs}, of which {reused} reused and {len(failed)} failed{not_done}")
    for state in failed[:FAILURES_SHOWN]:
        print(f"  {manifest.run_dir(state.number)}: {state.reason}")
    if len(failed) > FAILURES_SHOWN:
        print(f"  and {len(failed) - FAILURES_SHOWN} more")


def interrupted(manifest: Manifest) -> None:
    """End the MLflow run of a sweep that was interrupted, and say how to go on."""
    finish_parent(_uri(manifest), manifest.parent_id, [], "KILLED")
    log.info("sweep %s interrupted: %s", manifest.name, summary(job_states(manifest)))
    log.info("go on with: %s resume %s", command("bfpo-sweep"), manifest.name)


def _uri(manifest: Manifest) -> str:
    """Where the sweep is recorded, with the credentials that the manifest leaves out."""
    return resolve(manifest.config(0).tracking.uri, home())


def _shown(path: Path) -> Path:
    """A path as the user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def command(name: str) -> str:
    """A command of this project, with its path where the shell would not find it."""
    return name if shutil.which(name) else str(_shown(Path(sys.executable).parent / name))
