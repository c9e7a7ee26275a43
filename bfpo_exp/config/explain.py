"""Hydra's errors in one line: what was given, what is allowed, the nearest valid name."""

from __future__ import annotations

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from bfpo_exp.errors import UserError, unknown


def explain(error: HydraException | OmegaConfBaseException) -> UserError:
    """The user's view of an error that Hydra or OmegaConf raised while composing a config."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown(group or "config", name, error.options)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ConfigKeyError | AttributeError) and isinstance(
        parent := getattr(cause, "parent_node", None), DictConfig
    ):
        where = f"key in {parent._get_full_key(None)}" if parent._get_full_key(None) else "key"
        return unknown(where, str(cause.key), [str(key) for key in parent])  # type: ignore[union-attr]
    lines = [line.strip() for line in f"{error}".splitlines() if line.strip()]
    if cause is not None and cause is not error:
        lines = [*lines[:1], str(cause).splitlines()[0]]
    return UserError(": ".join(lines[:2]) if lines else type(error).__name__)
