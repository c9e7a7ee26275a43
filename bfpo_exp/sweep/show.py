"""Sweeps and their jobs as text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from bfpo_exp.heartbeat import living
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.state import DONE, JobState, State, job_states, summary, unfinished

COLOURS: dict[State, str] = {"running": "cyan", "failed": "red", "lost": "yellow", "queued": "dim"}
URGENT: tuple[State, ...] = ("running", "failed", "lost", "queued", *DONE)  # where there is no room for all


def sweep_line(manifest: Manifest) -> str:
    """One sweep: its name, how it stands, and the command that began it."""
    words = " ".join(manifest.command[1:])
    return f"{manifest.name}  {standing(manifest, job_states(manifest))}  {words}"


def standing(manifest: Manifest, states: Sequence[JobState]) -> str:
    """How a sweep stands as a whole, in one line."""
    left = len(unfinished(states))
    if not left:
        what = "finished"
    elif beat := living(manifest.folder):
        what = f"running (process {beat.pid} on {beat.host})"
    elif _with_slurm(manifest, states):
        what = "with SLURM"
    elif manifest.cancelled:
        what = "cancelled"
    else:
        ended = all(state.state in (*DONE, "failed") for state in states)
        what = "failed" if ended else "interrupted"
    return f"{what}, {summary(states)}"


def _with_slurm(manifest: Manifest, states: Sequence[JobState]) -> bool:
    """Whether SLURM has jobs of the sweep; it needs no process that shares them out."""
    return manifest.launcher["name"] == "slurm" and any(s.state in ("queued", "running") for s in states)


def job_lines(states: Sequence[JobState]) -> Iterator[str]:
    """A line a job: number, state, overrides, and what else there is to say."""
    if not states:
        return
    digits = len(str(states[-1].number))
    width = max(len(state.name) for state in states)
    for state in states:
        yield f"{state.number:>{digits}}  {state.state:<8}  {state.name:<{width}}  {state}".rstrip()


def print_status(manifest: Manifest) -> None:
    """The whole of a sweep: how it stands, its jobs, and how to go on."""
    states = job_states(manifest)
    print(f"sweep {manifest.name}: {standing(manifest, states)}")
    for line in job_lines(states):
        print(line)
    working = living(manifest.folder) is not None or _with_slurm(manifest, states)
    if unfinished(states) and not working:
        print(f"go on: bfpo-sweep resume {manifest.name}")


def watch(manifest: Manifest, every: float) -> None:
    """Show how a sweep stands, again and again, until nobody is at work on it.

    Where there are more jobs than lines, those that run, failed or were lost are shown first.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            manifest = Manifest.load(manifest.folder)  # a search adds jobs
            states = job_states(manifest)
            room = max(1, console.height - 3)
            urgent = sorted(states, key=lambda state: URGENT.index(state.state))[:room]
            text = Text(f"sweep {manifest.name}: {standing(manifest, states)}\n", no_wrap=True)
            for line, state in zip(job_lines(urgent), urgent, strict=True):
                text.append(line + "\n", style=COLOURS.get(state.state))
            live.update(text, refresh=True)
            working = living(manifest.folder) or any(state.state == "running" for state in states)
            if not working and not _with_slurm(manifest, states):
                return
            time.sleep(every)
