"""From a batch of overrides to jobs that are known to be runnable, frozen in the sweep's manifest."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import configure_log, filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from bfpo_exp.config.check import checked
from bfpo_exp.config.schema import Config
from bfpo_exp.distributed import group
from bfpo_exp.errors import UserError
from bfpo_exp.paths import writable_home
from bfpo_exp.preflight import preflight
from bfpo_exp.progress import progress
from bfpo_exp.run import run_code, run_key
from bfpo_exp.runtime import before_compute
from bfpo_exp.sweep.manifest import CANCELLED, Manifest
from bfpo_exp.sweep.state import OUTCOME
from bfpo_exp.tracking.environment import environment_tags
from bfpo_exp.tracking.parent import open_parent
from bfpo_exp.tracking.store import prepare


def planned(
    hydra_context: HydraContext,
    sweep_config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    first_number: int,
    launcher: Mapping[str, Any],
) -> tuple[Manifest, list[int]]:
    """The sweep with this batch of jobs added to it, and their numbers.

    ``launcher`` is kept for `resume`: its ``name`` and settings.  Raises `UserError` before anything
    is written if any job of the batch is not runnable.
    """
    if group().size > 1:
        raise UserError(
            f"a sweep starts its runs itself and cannot be started by {group().size} processes; start it "
            "bare, or single runs with torchrun"
        )
    configure_log(sweep_config.hydra.hydra_logging, sweep_config.hydra.verbose)
    root = writable_home()
    names = [" ".join(filter_overrides(overrides)) for overrides in job_overrides]
    configs: list[Config] = []
    with progress("configs", len(names)) as advance:
        for name, overrides in zip(names, job_overrides, strict=True):
            job = hydra_context.config_loader.load_sweep_config(sweep_config, list(overrides))
            configs.append(_checked(job, name))
            advance(1)
    tracking = configs[0].tracking
    uri = prepare(tracking, root)
    before_compute(configs[0].threads)
    with progress("checks", len(names)) as advance:
        for config, name in zip(configs, names, strict=True):
            _preflight(config, name)
            advance(1)
    folder = Path(sweep_config.hydra.sweep.dir).absolute()
    manifest = Manifest.load(folder) if first_number else _begun(folder, uri, tracking.experiment, launcher)
    if not first_number:
        words = " ".join(sweep_config.hydra.overrides.task)
        manifest.parent_id = open_parent(
            uri, tracking.experiment, manifest.name, folder, environment_tags(), {"overrides": words}
        )
    numbers = manifest.add((n, run_key(c), c) for n, c in zip(names, configs, strict=True))
    for number in numbers:
        (manifest.job_dir(number) / OUTCOME).unlink(missing_ok=True)  # of a sweep before in this folder
    manifest.save()
    return manifest, numbers


def _begun(folder: Path, uri: str, experiment: str, launcher: Mapping[str, Any]) -> Manifest:
    """A sweep without jobs and without an MLflow run yet."""
    (folder / CANCELLED).unlink(missing_ok=True)
    return Manifest(
        folder=folder,
        created=time.time(),
        started=time.time(),
        command=sys.argv,
        code=run_code(),
        uri=re.sub(r"//[^/@]*@", "//***@", uri),
        experiment=experiment,
        parent_id="",
        launcher=dict(launcher),
    )


def _checked(job: DictConfig, name: str) -> Config:
    try:
        return checked(OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"]))
    except UserError as error:
        raise UserError(f"{error} (in the sweep's job {name})") from None


def _preflight(config: Config, name: str) -> None:
    try:
        preflight(config)
    except UserError as error:
        raise UserError(f"{error} (in the sweep's job {name})") from None
