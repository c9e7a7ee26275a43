"""``hydra/launcher=local``: the jobs of a sweep on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """Checks every job of the sweep, then does ``n_jobs`` at a time in warm worker processes."""

    def __init__(self, n_jobs: int | None) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once, before `launch`."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by the sweeper with the overrides of a batch of jobs."""
        from bfpo_exp.sweep.local import launch  # heavy, and Hydra imports every plugin at its start

        return launch(self.hydra_context, self.config, self.n_jobs, job_overrides, initial_job_idx)
