"""``hydra/launcher=local``: the jobs of a sweep on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """Checks every job of the sweep, then does ``n_jobs`` at a time in warm worker processes.

    A job that fails is tried again ``retries`` times; with ``fail_fast`` no job begins after one that
    failed for good.
    """

    def __init__(self, n_jobs: int | None, retries: int, fail_fast: bool) -> None:
        self.settings = {"n_jobs": n_jobs, "retries": retries, "fail_fast": fail_fast}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once, before `launch`."""
        from bfpo_exp.sweep.compose import JobLoader

        # The sweeper has the same context, and composes every job too.
        hydra_context.config_loader = JobLoader(hydra_context.config_loader)  # type: ignore[assignment]
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by the sweeper with the overrides of a batch of jobs.

        What it gets back holds no configs: a thousand of them would fill the memory.
        """
        from bfpo_exp.sweep import ending  # heavy, and Hydra imports every plugin at its start
        from bfpo_exp.sweep.local import drive
        from bfpo_exp.sweep.plan import planned

        launcher = {"name": "local", **self.settings}
        manifest, numbers = planned(self.hydra_context, self.config, job_overrides, initial_job_idx, launcher)
        ending.note(manifest)
        outcomes = drive(manifest, numbers)
        return [
            JobReturn(
                overrides=list(overrides), working_dir=str(manifest.run_dir(number)),
                status=JobStatus.COMPLETED,
                _return_value=outcomes[number].metrics if number in outcomes else {},
            )
            for overrides, number in zip(job_overrides, numbers, strict=True)
        ]  # fmt: skip
