"""A sweep on this machine: every job checked, then shared out over warm worker processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from bfpo_exp.config.check import checked
from bfpo_exp.config.schema import Config
from bfpo_exp.distributed import group
from bfpo_exp.errors import UserError
from bfpo_exp.paths import home, writable_home
from bfpo_exp.preflight import preflight
from bfpo_exp.progress import progress
from bfpo_exp.run import run_key
from bfpo_exp.runtime import before_compute
from bfpo_exp.sweep import ending
from bfpo_exp.sweep.workers import do_all, worker_count
from bfpo_exp.tracking.environment import environment_tags
from bfpo_exp.tracking.parent import open_parent
from bfpo_exp.tracking.store import prepare

log = logging.getLogger(__name__)


def launch(
    hydra_context: HydraContext,
    sweep_config: DictConfig,
    n_jobs: int | None,
    job_overrides: Sequence[Sequence[str]],
    first_number: int,
) -> list[JobReturn]:
    """Do a batch of jobs; one that fails keeps no other from running.

    Raises `UserError` before the first job starts if any of them is not runnable.
    """
    if group().size > 1:
        raise UserError(
            f"a sweep starts its runs itself and cannot be started by {group().size} processes; start it "
            "bare, or single runs with torchrun"
        )
    configure_log(sweep_config.hydra.hydra_logging, sweep_config.hydra.verbose)
    root = writable_home()
    names = [" ".join(filter_overrides(overrides)) for overrides in job_overrides]
    jobs = list(_composed(hydra_context, sweep_config, job_overrides, first_number))
    configs = [_checked(job, name) for job, name in zip(jobs, names, strict=True)]
    tracking = configs[0].tracking
    uri = prepare(tracking, root)
    before_compute(configs[0].threads)
    for config, name in zip(configs, names, strict=True):
        _preflight(config, name)

    sweep_dir = Path(sweep_config.hydra.sweep.dir).absolute()
    parameters = {"overrides": " ".join(sweep_config.hydra.overrides.task), "jobs": len(jobs)}
    parent_id = open_parent(
        uri, tracking.experiment, sweep_dir.name, sweep_dir, environment_tags(), parameters
    )
    for job, config in zip(jobs, configs, strict=True):
        _write_job_folder(job, config)
    workers = worker_count(n_jobs, configs)
    log.info("sweep %s: %d runs, %d at a time", sweep_dir.name, len(jobs), workers)
    outcomes = {}
    with progress("sweep", len(jobs)) as advance:
        for i, outcome in do_all(configs, uri, parent_id, workers):
            outcomes[i] = outcome
            log.info("[%d/%d] %s: %s", len(outcomes), len(jobs), names[i], outcome)
            advance(1)
    done = [outcomes[i] for i in range(len(jobs))]
    ending.note(uri, tracking, sweep_dir, parent_id, done)
    return [
        JobReturn(
            overrides=list(overrides), cfg=job, hydra_cfg=job.hydra, working_dir=str(outcome.run_dir),
            status=JobStatus.COMPLETED, _return_value=outcome.metrics,
        )
        for overrides, job, outcome in zip(job_overrides, jobs, done, strict=True)
    ]  # fmt: skip


def _composed(
    hydra_context: HydraContext,
    sweep_config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first_number: int,
) -> Iterator[DictConfig]:
    for number, overrides in enumerate(job_overrides, start=first_number):
        job = hydra_context.config_loader.load_sweep_config(sweep_config, list(overrides))
        with open_dict(job):
            job.hydra.job.id = str(number)
            job.hydra.job.num = number
        yield job


def _checked(job: DictConfig, name: str) -> Config:
    try:
        return checked(_without_hydra(job))
    except UserError as error:
        raise UserError(f"{error} (in the sweep's job {name})") from None


def _preflight(config: Config, name: str) -> None:
    try:
        preflight(config)
    except UserError as error:
        raise UserError(f"{error} (in the sweep's job {name})") from None


def _without_hydra(job: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])


def _write_job_folder(job: DictConfig, config: Config) -> None:
    """What Hydra's users look for in a job's folder, and a link to the run that does the job."""
    folder = Path(job.hydra.sweep.dir).absolute() / str(job.hydra.sweep.subdir)
    about = folder / job.hydra.output_subdir
    about.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(_without_hydra(job), about / "config.yaml")
    OmegaConf.save(job.hydra.overrides.task, about / "overrides.yaml")
    link = folder / "run"
    if not link.is_symlink():
        link.symlink_to(home() / "run" / run_key(config))
