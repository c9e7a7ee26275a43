"""What a sweep is to do: its jobs with their configs, written down before the first one starts.

The folder of a sweep holds `MANIFEST` and a folder a job, named by its number, with

- ``config.json``: the job's config, resolved and frozen: what is done is this, whatever has become
  of ``conf/`` since;
- ``run``: a link to the folder of the run that does the job;
- ``outcome.json``: how the job ended (`bfpo_exp.sweep.state`), and ``job.log``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bfpo_exp.errors import UserError, unknown
from bfpo_exp.paths import home

if TYPE_CHECKING:
    from bfpo_exp.config.schema import Config

MANIFEST = "sweep.json"
FROZEN = "config.json"
RUN_LINK = "run"
CANCELLED = "cancelled"  # a file: no job of the sweep is to start
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Job:
    """One job: its overrides, the key of its run, and the digest of its frozen config."""

    number: int
    name: str
    key: str
    digest: str


@dataclass
class Manifest:
    """A sweep.

    Attributes:
        folder: where it is; its name is the sweep's.
        created: seconds since the epoch; ``started``: when it was last started or resumed.
        command: the words of the command line.
        code: the version of the code that its runs are of (`bfpo_exp.run.run_code`).
        uri: where its runs are recorded, without credentials; ``experiment``: under which name.
        parent_id: its own MLflow run.
        launcher: how its jobs are started: ``name``, and that launcher's settings.
        jobs: in the order of their numbers.
    """

    folder: Path
    created: float
    started: float
    command: list[str]
    code: str
    uri: str
    experiment: str
    parent_id: str
    launcher: dict[str, Any]
    jobs: list[Job] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.folder.name

    @property
    def numbers(self) -> list[int]:
        """The numbers of its jobs."""
        return [job.number for job in self.jobs]

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled, and not resumed since."""
        return (self.folder / CANCELLED).exists()

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The sweep in a folder; a `UserError` where there is none."""
        try:
            kept = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise UserError(f"{folder} is no sweep: it has no {MANIFEST}") from None
        return cls(folder, **kept | {"jobs": [Job(**job) for job in kept["jobs"]]})

    def save(self) -> None:
        """Write it whole or not at all."""
        state = asdict(self)
        del state["folder"]
        write_whole(self.folder / MANIFEST, json.dumps(state, indent=1))

    def job(self, number: int) -> Job:
        """The job of this number."""
        for job in self.jobs[number : number + 1]:  # they are numbered from 0 without gaps
            return job
        raise UserError(f"the sweep {self.name} has no job {number}; allowed: 0 to {len(self.jobs) - 1}")

    def job_dir(self, number: int) -> Path:
        """The folder of a job."""
        return self.folder / str(number)

    def add(self, jobs: Iterable[tuple[str, str, Config]]) -> list[int]:
        """Freeze further jobs, each (name, run key, config); gives their numbers.

        The manifest is not saved yet.
        """
        numbers = []
        for name, key, config in jobs:
            number = len(self.jobs)
            text = json.dumps(config.model_dump(mode="json"), indent=1)
            folder = self.job_dir(number)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / FROZEN, text)
            self.jobs.append(Job(number, name, key, _digest(text)))
            self.link(number, key)
            numbers.append(number)
        return numbers

    def config(self, number: int) -> Config:
        """The frozen config of a job; a `UserError` if the file is not the one that was frozen."""
        from bfpo_exp.config.schema import Config

        file = self.job_dir(number) / FROZEN
        text = file.read_text()
        if _digest(text) != self.job(number).digest:
            raise UserError(f"{file} was changed after the sweep began; start a new sweep instead")
        return Config.model_validate_json(text)

    def link(self, number: int, key: str) -> None:
        """Point the job's folder to the run that does it; relatively, as the runs root may be moved."""
        link = self.job_dir(number) / RUN_LINK
        target = os.path.relpath(home() / "run" / key, link.parent)
        if not (link.is_symlink() and os.readlink(link) == target):
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def run_dir(self, number: int) -> Path:
        """The folder of the run that does a job; it may not be there yet."""
        folder = self.job_dir(number)
        return Path(os.path.normpath(folder / os.readlink(folder / RUN_LINK)))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    os.replace(draft, path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sweeps() -> list[Manifest]:
    """Every sweep under the runs root, the latest first."""
    files = home().glob(f"sweep/*/{MANIFEST}")
    return sorted((Manifest.load(file.parent) for file in files), key=lambda m: m.created, reverse=True)


def find(given: str | None) -> Manifest:
    """The sweep of this name or folder; the latest for None.  A `UserError` where there is none."""
    if given is not None:
        for folder in (home() / "sweep" / given, Path(given)):
            if (folder / MANIFEST).is_file():
                return Manifest.load(folder.absolute())
    known = sweeps()
    if not known:
        raise UserError(f"there is no sweep under {home()}; run one first, such as `bfpo-exp -m seed=0,1,2`")
    if given is None:
        return known[0]
    raise unknown("sweep", given, _nearest_first(given, [sweep.name for sweep in known]))


def _nearest_first(given: str, names: Sequence[str]) -> list[str]:
    """The latest few, and those whose names are like what was given."""
    import difflib

    return list(dict.fromkeys([*names[:NAMES_SHOWN], *difflib.get_close_matches(given, names, cutoff=0.5)]))
