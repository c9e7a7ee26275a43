"""The study of a search: its trials, kept with Optuna where several processes may share them.

A study is a journal in ``search/<name>`` of the runs root.  Each of its trials has a place, 0 to
n_trials - 1.  What is proposed for a place depends on the seed, the place and the trials that are
known, never on what this process drew before: a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from bfpo_exp.errors import UserError, unknown
from bfpo_exp.hashing import stable_hash
from bfpo_exp.heartbeat import Heartbeat, living
from bfpo_exp.paths import writable_home
from bfpo_exp.run import run_code
from bfpo_exp.sweep.space import Params, Space, tidy
from bfpo_exp.sweep.state import DONE, JobState

if TYPE_CHECKING:
    from bfpo_exp.sweep.search import Settings

DIGITS = 4  # of a proposed number: enough for any score, and short in tables
PLACE, PROCESS, REASON, MADE_OF = "place", "process", "reason", "made_of"  # attributes of trials and study


class Evolution(NSGAIISampler):
    """NSGA-II, whose parents are in the same order when they are selected and when they are read again."""

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """Called for the first proposal of a generation; Optuna keeps their numbers for the others."""
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


class Proposals(BaseSampler):
    """Another sampler, made anew for each place, whose numbers are rounded to `DIGITS`."""

    def __init__(self, settings: Settings, points: Sequence[Params]) -> None:
        self._settings = settings
        self._points = points  # of a grid
        self.at(0)

    def at(self, place: int) -> None:
        """The next proposal is for this place."""
        seed = int(np.random.SeedSequence([self._settings.seed, place]).generate_state(1)[0])
        if self._settings.sampler == "nsga2":
            self._sampler: BaseSampler = Evolution(population_size=self._settings.population, seed=seed)
        else:
            self._sampler = TPESampler(seed=seed) if self._settings.sampler == "tpe" else RandomSampler(seed)
        self._point = self._points[place] if self._points else {}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """What the sampler proposes together."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Values for what is proposed together."""
        found = self._sampler.sample_relative(study, trial, search_space)
        return {name: _rounded(value, search_space[name]) for name, value in found.items()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A value for what is proposed alone, and for all of a grid."""
        if self._point:
            return self._point[param_name]
        value = self._sampler.sample_independent(study, trial, param_name, param_distribution)
        return _rounded(value, param_distribution)


def _rounded(value: Any, distribution: BaseDistribution) -> Any:
    if not isinstance(distribution, FloatDistribution):
        return value
    if distribution.step is not None:
        return tidy(value)
    return min(max(tidy(value, DIGITS), distribution.low), distribution.high)


class Study:
    """The trials of a search, on disk."""

    def __init__(self, space: Space, settings: Settings) -> None:
        points = space.points() if settings.sampler == "grid" else []
        self.space, self.settings = space, settings
        self.n_trials = len(points) or settings.n_trials
        made_of = {"objectives": ", ".join(settings.objectives), **space.made_of(), "code": run_code()}
        drawn = [settings.sampler, settings.seed, settings.population]
        self.name = str(settings.study or stable_hash([made_of, drawn])[:8])
        self.folder = writable_home() / "search" / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        # One lock for the journal and for what must happen between its entries; a kill releases it.
        self._lock = FileLock(self.folder / ".lock")
        backend = JournalFileBackend(str(self.folder / "study.journal"), lock_obj=self._lock)  # type: ignore[arg-type]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sampler = Proposals(settings, points)
        with self._lock:
            self._study = optuna.create_study(
                study_name=self.name,
                storage=JournalStorage(backend),
                sampler=self._sampler,
                directions=["minimize" if name[0] == "-" else "maximize" for name in settings.objectives],
                load_if_exists=True,
            )
            before = self._study.user_attrs.get(MADE_OF, made_of)
            for part in made_of:
                if before[part] != made_of[part]:
                    raise UserError(
                        f"the study {self.name} exists with another {part} ({before[part]}, not "
                        f"{made_of[part]}); give this one another name: hydra.sweeper.study=..."
                    )
            self._study.set_user_attr(MADE_OF, made_of)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Meanwhile this process may ask; its trials without an outcome are others' as soon as it is gone."""
        with tempfile.TemporaryDirectory(prefix="process-", dir=self.folder) as own, Heartbeat(Path(own)):
            self._own = Path(own).name
            yield

    def finished(self) -> list[FrozenTrial]:
        """The trials that have scores."""
        return self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])

    def ask(self) -> list[Trial]:
        """Further trials, at most a batch; none where each place has one that ended or that somebody does."""
        with self._lock:
            taken = set()
            for trial in self._study.get_trials(deepcopy=False):
                if trial.state == TrialState.RUNNING and self._lost(trial):
                    self._study.tell(trial.number, state=TrialState.FAIL)
                elif trial.state != TrialState.FAIL or REASON in trial.user_attrs:
                    taken.add(trial.user_attrs[PLACE])
            free = (place for place in range(self.n_trials) if place not in taken)
            return [self._ask(place) for place in itertools.islice(free, self.settings.batch)]

    def _lost(self, trial: FrozenTrial) -> bool:
        """Whether the process that did a running trial is gone."""
        folder = self.folder / trial.user_attrs.get(PROCESS, "killed while it asked")
        gone = living(folder) is None
        if gone:
            shutil.rmtree(folder, ignore_errors=True)
        return gone

    def _ask(self, place: int) -> Trial:
        self._sampler.at(place)
        trial = self._study.ask({d.key: d.distribution for d in self.space.dimensions})
        trial.set_user_attr(PLACE, place)
        trial.set_user_attr(PROCESS, self._own)
        return trial

    def tell(self, trial: Trial, job: JobState, metrics: Mapping[str, float]) -> None:
        """Keep what came of a trial; a `UserError` if it lacks a metric that no trial has had yet."""
        reason = "" if job.state in DONE else job.reason or job.state
        if not reason:
            missing = [metric for metric in self.settings.metrics if metric not in metrics]
            if missing and not self.finished():
                raise unknown("metric in hydra.sweeper.objectives", missing[0], metrics)
            values = {metric: metrics.get(metric, math.nan) for metric in self.settings.metrics}
            reason = ", ".join(f"{m} is {value}" for m, value in values.items() if not math.isfinite(value))
        with contextlib.suppress(UpdateFinishedTrialError):  # taken for lost, and done by another process
            if reason:
                trial.set_user_attr(REASON, reason)
                self._study.tell(trial, state=TrialState.FAIL)
            else:
                self._study.tell(trial, [metrics[metric] for metric in self.settings.metrics])

    def __str__(self) -> str:
        trials = self._study.get_trials(deepcopy=False)
        counts = {
            "failed": sum(REASON in trial.user_attrs for trial in trials),
            "running": sum(trial.state == TrialState.RUNNING for trial in trials),
        }
        rest = "".join(f", {count} {how}" for how, count in counts.items() if count)
        return f"search {self.name}: {len(self.finished())} of {self.n_trials} trials done{rest}"

    def report(self) -> str:
        """The trials that no other beats in all objectives, the best by the first objective first."""
        best = self._study.best_trials
        sign = -1 if self.settings.objectives[0].startswith("-") else 1
        lines = []
        for trial in sorted(best, key=lambda trial: -sign * trial.values[0]):
            scores = zip(self.settings.metrics, trial.values, strict=True)
            job = [word for word in self.space.job(trial.params) if word not in self.space.fixed]
            lines.append("  ".join([*(f"{metric} {value:.4g}" for metric, value in scores), *job]))
        title = "best" if len(self.settings.metrics) == 1 else "Pareto front"
        return "\n".join([f"{self}; {title}:", *(dict.fromkeys(lines) or ["none yet"])])
