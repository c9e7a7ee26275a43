"""``hydra/sweeper=optuna``: jobs that are proposed one batch after another, by what the last ones scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Searches the values that the overrides leave open; its settings are explained in its config."""

    def __init__(self, params: Mapping[str, Any] | None, **settings: Any) -> None:
        self.params = [f"{key}={value}" for key, value in (params or {}).items()]
        self.settings = settings  # of `bfpo_exp.sweep.search.Settings`

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra once, before `sweep`."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra with the overrides of the command line."""
        from bfpo_exp.errors import UserError
        from bfpo_exp.sweep.search import Settings, search  # heavy, and Hydra imports every plugin
        from bfpo_exp.sweep.space import Space

        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        settings = Settings(**self.settings)
        space = Space([*self.params, *arguments], self.hydra_context.config_loader, self.config)
        settings.check_objectives(space.checked())
        dry = self.config.hydra.output_subdir is None
        if isinstance(self.launcher, BasicLauncher) and not dry:
            raise UserError(
                "hydra/launcher=basic tells no scores, which a search needs; allowed: local, slurm"
            )
        folder = Path(self.config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        if dry:  # nothing is scored, so that nothing can be proposed
            self.launcher.launch(space.corners(), initial_job_idx=0)
        else:
            search(space, settings, self.launcher, folder)
