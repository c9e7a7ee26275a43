"""What is said of a loss and its data before any compute is spent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from datasets import Dataset

from bfpo_exp import preflight as module
from bfpo_exp.config.schema import Config
from bfpo_exp.preflight import preflight

SMALL = ("data.pairs.world_helpfulness.size=40", "data.pairs.world_safety.size=40")


@dataclass(frozen=True)
class Mix:
    """What of a mix of pairs is looked at: its labels."""

    records: Dataset

    @classmethod
    def of(cls, safe_w: list[float], safe_l: list[float]) -> Mix:
        return cls(Dataset.from_dict({"safe_w": safe_w, "safe_l": safe_l}))


@pytest.fixture
def warned(
    config: Callable[..., Config], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """The warnings of these words of a command line."""
    monkeypatch.setattr(logging.getLogger("bfpo_exp"), "propagate", True)

    def of(*overrides: str, again: bool = False) -> list[str]:
        caplog.clear()
        if not again:
            module._warn.cache_clear()
        with caplog.at_level(logging.WARNING, logger="bfpo_exp"):
            preflight(config(*SMALL, *overrides))
        return [record.getMessage() for record in caplog.records]

    return of


def test_a_sound_run_says_nothing(warned: Callable[..., list[str]]) -> None:
    for loss in ("bfpo", "safedpo", "bso", "dpo", "sacpo", "modpo"):
        assert warned(f"loss={loss}") == []


def test_an_alpha_that_breaks_the_order_is_warned_of_once(warned: Callable[..., list[str]]) -> None:
    (line,) = warned("loss.alpha=1.2")
    assert line.startswith("warning: loss bfpo: alpha=1.2 at b1=3 breaks the order of BFPO's labels: ")
    assert "(safe, safe) = -0.2 is not above 0" in line
    assert "(safe, unsafe) 0.3, (safe, safe) -0.2, (unsafe, unsafe) -1.2, (unsafe, safe) -1.7" in line
    assert warned("loss.alpha=1.2", "seed=1", again=True) == []
    assert len(warned("loss.alpha=1.3", again=True)) == 1


def test_labels_that_are_all_the_same_are_warned_of(warned: Callable[..., list[str]]) -> None:
    only_helpfulness = ("data.streams=[helpfulness]", "data.batches=shuffle")
    (line,) = warned(*only_helpfulness)
    assert "every response of its pairs is labelled safe" in line
    assert warned("loss=dpo", *only_helpfulness) == []


def label_warnings(loss: Any, *mixes: Mix) -> list[str]:
    return module._label_warnings(loss, mixes)  # type: ignore[arg-type]


def test_probabilities_that_mix_the_cells_are_warned_of(config: Callable[..., Config]) -> None:
    """g = 1.5 s_w - 0.5 s_l - 0.5: (0.55, 0.1) gives 0.275, less than 0.5 of (1, 1)."""
    loss = config("loss=bfpo").loss
    assert label_warnings(loss, Mix.of([1, 1, 0], [0, 1, 1])) == []
    assert label_warnings(loss, Mix.of([0.9, 0.1], [0.2, 0.8])) == []
    (line,) = label_warnings(loss, Mix.of([0.55, 1], [0.1, 1]), Mix.of([0], [1]))
    assert "the cells (safe, unsafe) and (safe, safe) overlap" in line
    assert "(safe, unsafe) 0.275 to 0.275, (safe, safe) 0.5 to 0.5, (unsafe, safe) -1 to -1" in line
