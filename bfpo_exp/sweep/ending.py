"""How a sweep ends: its table and plot, in the terminal and on the parent run."""

from __future__ import annotations

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
    from bfpo_exp.compare.report import sweep_report
    from bfpo_exp.tracking.parent import finish_parent

    bad = 0
    for sweep in _sweeps.values():
        text, files = sweep_report(
            sweep.uri, sweep.tracking.experiment, sweep.parent_id, sweep.folder / "comparison"
        )
        print(text)
        failures = [o for o in sweep.outcomes if o.status == "failed"]
        bad += len(failures)
        finish_parent(sweep.uri, sweep.parent_id, files, "FAILED" if failures else "FINISHED")
        reused = sum(o.status == "reused" for o in sweep.outcomes)
        print(f"{len(sweep.outcomes)} runs, of which {reused} reused and {len(failures)} failed")
        for file in files:
            print(f"  {file}")
        print(f"table again: bfpo-compare {sweep.folder.name}    dashboard: bfpo-ui")
    _sweeps.clear()
    return 1 if bad else 0
