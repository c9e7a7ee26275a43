"""How a sweep ends: its table and plot, in the terminal and on the parent run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bfpo_exp.config.schema import Tracking
from bfpo_exp.run import Outcome


@dataclass
class Sweep:
    """A sweep that has run in this process, perhaps in several batches."""

    uri: str
    tracking: Tracking
    folder: Path
    parent_id: str
    outcomes: list[Outcome] = field(default_factory=list)


_sweeps: dict[str, Sweep] = {}


def note(uri: str, tracking: Tracking, folder: Path, parent_id: str, outcomes: Sequence[Outcome]) -> None:
    """Remember a batch of a sweep's runs until the sweep ends."""
    _sweeps.setdefault(parent_id, Sweep(uri, tracking, folder, parent_id)).outcomes.extend(outcomes)


def conclude() -> int:
    """Print and record the comparison of each sweep that ran; the exit code: 1 if a run failed."""
    from bfpo_exp.compare.render import show
    from bfpo_exp.compare.report import sweep_report
    from bfpo_exp.tracking.parent import finish_parent

    bad = 0
    for sweep in _sweeps.values():
        table, files = sweep_report(
            sweep.uri, sweep.tracking.experiment, sweep.parent_id, sweep.folder / "comparison"
        )
        for outcome in sweep.outcomes:
            if outcome.report:
                print(f"{_shown(outcome.run_dir)}\n{outcome.report}\n")
        print(table) if isinstance(table, str) else show(table)
        failures = [o for o in sweep.outcomes if o.status == "failed"]
        bad += len(failures)
        finish_parent(sweep.uri, sweep.parent_id, files, "FAILED" if failures else "FINISHED")
        reused = sum(o.status == "reused" for o in sweep.outcomes)
        runs = f"{len(sweep.outcomes)} run{'s' if len(sweep.outcomes) > 1 else ''}"
        print(f"\n{runs}, of which {reused} reused and {len(failures)} failed")
        for failure in failures:
            print(f"  {failure.run_dir}: {failure.reason}")
        if files:
            print(f"table and plot: {_shown(files[0].parent)} ({', '.join(f.name for f in files)})")
            print(f"table again:    {_command('bfpo-compare')} {sweep.folder.name}")
        print(f"dashboard:      {_command('bfpo-ui')}")
    _sweeps.clear()
    return 1 if bad else 0


def _shown(path: Path) -> Path:
    """A path as the user would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _command(name: str) -> str:
    """A command of this project, with its path where the shell would not find it."""
    return name if shutil.which(name) else str(_shown(Path(sys.executable).parent / name))
