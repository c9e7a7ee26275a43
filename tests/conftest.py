"""What the tests share: configs composed as the command composes them, tiny models, made pairs."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from app_support import Command, Done
from server_support import server  # noqa: F401
from slurm_support import slurm  # noqa: F401

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

    from bfpo_exp.config.schema import Config
    from bfpo_exp.data.pairs import TokenisedPairs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those that need SLURM share one cluster, so they follow one another."""
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.fixture(scope="session")
def compose() -> Callable[..., DictConfig]:
    """The config that the command would get from these words of a command line."""
    from hydra import compose, initialize_config_dir

    from bfpo_exp.paths import config_dir

    def composed(*overrides: str, hydra_too: bool = False) -> DictConfig:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("config", list(overrides), return_hydra_config=hydra_too)

    return composed


@pytest.fixture(scope="session")
def config(compose: Callable[..., DictConfig]) -> Callable[..., Config]:
    """The same, checked; composed once for all tests, as it cannot be changed."""
    from bfpo_exp.config.check import checked

    return functools.cache(lambda *overrides: checked(compose(*overrides)))


@pytest.fixture(scope="session")
def preference_config(config: Callable[..., Config]) -> Callable[..., Config]:
    """A loss's default run on batches of 16, all weights trained; changes read ``loss__beta=0.5``."""
    from bfpo_exp.config.schema import Config

    def changed(loss: str, **changes: Any) -> Config:
        values = config(f"loss={loss}").model_dump()
        values["train"] |= {"trainable": "all", "batch": 16, "microbatch": 16, "lr": 1e-3, "log_every": 1}
        for key, value in changes.items():
            *path, last = key.split("__")
            functools.reduce(operator.getitem, path, values)[last] = value
        return Config.model_validate(values)

    return changed


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Random models of two blocks: `model_support.made_model`."""
    from model_support import made_model

    return made_model


@pytest.fixture(scope="session")
def random_pairs() -> Callable[..., TokenisedPairs]:
    """Pairs of random tokens with every label known: `model_support.made_pairs`."""
    from model_support import made_pairs

    return made_pairs


@pytest.fixture(autouse=True)
def libraries_as_they_were() -> Iterator[None]:
    """What a run sets for its process (`runtime.before_compute`) does not reach the next test."""
    import torch

    from bfpo_exp import runtime

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)  # other tests draw such numbers
    runtime._once.cache_clear()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """``bfpo-exp`` in this process, with a runs root of the test's own."""
    from hydra.core.global_hydra import GlobalHydra

    from bfpo_exp import app

    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path / "runs"))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["bfpo-exp", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        GlobalHydra.instance().clear()
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.command()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run
