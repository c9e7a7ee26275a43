"""Composing the jobs of a sweep without reading the same config files for each of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


class JobLoader:
    """A config loader that composes one job for each choice of groups, and sets values in copies of it.

    Hydra's own needs 0.1 s a job, twice: its sweeper composes every job to see that it can be.
    Values are set after all files are merged, so setting them in a copy gives the same config;
    overrides that add or delete keys, or that fail, are left to Hydra's loader.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of the job with these overrides."""
        parsed = OverridesParser.create().parse_overrides(sweep_overrides)
        values = [override for override in parsed if self._sets_a_value(override)]
        rest = [override for override in parsed if override not in values]
        if not all(self._chooses(override) for override in rest):
            return self._loader.load_sweep_config(master_config, sweep_overrides)
        job = copy.deepcopy(self._of_groups(master_config, [str(o.input_line) for o in rest]))
        try:
            for override in values:
                OmegaConf.update(job, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:  # Hydra words it
            return self._loader.load_sweep_config(master_config, sweep_overrides)
        lines = [str(override.input_line) for override in parsed if not override.is_hydra_override()]
        with open_dict(job):
            job.hydra.overrides.task = lines
            job.hydra.job.override_dirname = ",".join(sorted(lines))
        return job

    def _of_groups(self, master_config: DictConfig, choices: Sequence[str]) -> DictConfig:
        """The job with these choices alone, composed once."""
        if (key := tuple(choices)) not in self._composed:
            self._composed[key] = self._loader.load_sweep_config(master_config, list(choices))
        return self._composed[key]

    def _sets_a_value(self, override: Override) -> bool:
        plain = override.type == OverrideType.CHANGE and override.package is None
        of_hydra = override.is_hydra_override()
        return plain and not of_hydra and not self._is_group(override)

    def _chooses(self, override: Override) -> bool:
        return override.is_hydra_override() or (
            override.type == OverrideType.CHANGE and self._is_group(override)
        )

    def _is_group(self, override: Override) -> bool:
        """Whether Hydra takes it for a choice of a config file; a mapping is a value in any case."""
        group_exists: bool = self._loader.repository.group_exists(override.key_or_group)  # type: ignore[attr-defined]
        return group_exists and not isinstance(override.value(), dict)
