"""``hydra/launcher=slurm``: the jobs of a sweep as jobs of SLURM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SlurmLauncher(Launcher):
    """Checks every job of the sweep, writes it down, hands all of it in to SLURM, and returns.

    With ``wait`` it returns when the jobs have ended.  The settings are explained in its config.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once, before `launch`."""
        from bfpo_exp.sweep.compose import JobLoader

        # The sweeper has the same context, and composes every job too.
        hydra_context.config_loader = JobLoader(hydra_context.config_loader)  # type: ignore[assignment]
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by the sweeper with the overrides of a batch of jobs."""
        from bfpo_exp.errors import UserError
        from bfpo_exp.sweep import ending, slurm  # heavy, and Hydra imports every plugin at its start
        from bfpo_exp.sweep.plan import planned
        from bfpo_exp.sweep.slurm_settings import checked_settings
        from bfpo_exp.tracking.metrics_file import MetricsFile

        plain = {
            name: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for name, v in self.settings.items()
        }
        settings = checked_settings(plain)
        if not settings.wait and not self.config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            raise UserError(
                "this hydra/sweeper chooses jobs by how earlier ones scored; set hydra.launcher.wait=true"
            )
        slurm.would_take(settings)
        launcher = {"name": "slurm", **settings.model_dump()}
        manifest, numbers = planned(self.hydra_context, self.config, job_overrides, initial_job_idx, launcher)
        try:
            slurm.submit(manifest, numbers)
        except UserError:
            ending.interrupted(manifest)
            raise
        if settings.wait:
            ending.note(manifest)
            slurm.wait_for(manifest, numbers)
        return [
            JobReturn(
                overrides=list(overrides), working_dir=str(manifest.run_dir(number)),
                status=JobStatus.COMPLETED,
                _return_value=MetricsFile(manifest.run_dir(number) / "metrics.jsonl").last(),
            )
            for overrides, number in zip(job_overrides, numbers, strict=True)
        ]  # fmt: skip
