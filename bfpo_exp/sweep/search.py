"""Search: the settings of ``hydra/sweeper=optuna``, and its jobs, one batch after another."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.plugins.launcher import Launcher

from bfpo_exp.compare.table import LOWER_IS_BETTER
from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError, unknown
from bfpo_exp.eval.summary import summarise
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.space import Space
from bfpo_exp.sweep.state import DONE, job_state
from bfpo_exp.sweep.study import Study

log = logging.getLogger(__name__)
SAMPLERS = ("tpe", "nsga2", "random", "grid")


@dataclass(frozen=True)
class Settings:
    """The settings of ``hydra.sweeper``, which its config explains; each is checked."""

    objectives: Sequence[str]
    sampler: str
    n_trials: int
    batch: int
    population: int
    seed: int
    study: str | None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise unknown("hydra.sweeper.sampler", self.sampler, SAMPLERS)
        for name, least in (("n_trials", 1), ("batch", 1), ("population", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"hydra.sweeper.{name}={value}; allowed: a whole number >= {least}")
        repeated = len(set(self.metrics)) < max(1, len(self.metrics))
        if isinstance(self.objectives, str) or not all(self.metrics) or repeated:
            raise UserError(
                f"hydra.sweeper.objectives={self.objectives}; allowed: a list of metrics, each once, such as "
                "[eval/gen,-eval/over_refusal]"
            )
        if wrong := LOWER_IS_BETTER.intersection(self.objectives):
            raise UserError(
                f"hydra.sweeper.objectives: less is better of {min(wrong)}; allowed: -{min(wrong)}"
            )
        if self.study is not None and not re.fullmatch(r"\w[\w.-]*", str(self.study)):
            raise UserError(f"hydra.sweeper.study={self.study}; allowed: letters, digits, . _ - (not first)")

    @property
    def metrics(self) -> list[str]:
        """The names of the objectives."""
        return [objective.removeprefix("-") for objective in self.objectives]

    def check_objectives(self, configs: Sequence[Config]) -> None:
        """A `UserError` for a score that no job has.

        The names of other metrics are not known before a job has finished: see `Study.tell`.
        """
        known: set[str] = set()
        for tasks in (config.eval.tasks for config in configs if "evaluate" in config.stages):
            judged = {task: [{"score": 0.0, "safe": True, "malformed": False}] for task in tasks}
            known |= summarise(tasks, judged, {}).keys()
        for metric in self.metrics:
            if metric.startswith("eval/") and metric not in known:
                raise unknown("metric in hydra.sweeper.objectives", metric, known)


def search(space: Space, settings: Settings, launcher: Launcher, folder: Path) -> None:
    """Do what is left of a study, in the sweep of this folder.

    The trials that were done before are its first jobs: reused runs, which its comparison shows.
    A run that fails is a failed trial.  Trials without an outcome (an interruption, ``fail_fast``) are
    taken up by whoever searches next.
    """
    study = Study(space, settings)
    with study.at_work():
        log.info("%s", study)
        jobs = [space.job(trial.params) for trial in study.finished()]
        first = 0
        while (asked := study.ask()) or jobs:
            begin = first + len(jobs)
            jobs += [space.job(trial.params) for trial in asked]
            results = launcher.launch(jobs, initial_job_idx=first)
            manifest = Manifest.load(folder)
            states = [job_state(manifest, number) for number in range(begin, first + len(jobs))]
            for trial, state, result in zip(asked, states, results[len(jobs) - len(asked) :], strict=True):
                if state.state in (*DONE, "failed"):
                    study.tell(trial, state, result.return_value)
            log.info("%s", study)
            if any(state.state not in (*DONE, "failed") for state in states):
                break
            first, jobs = first + len(jobs), []
        print(f"{study.report()}\n")
