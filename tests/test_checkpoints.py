"""Checkpoints: whole or not at all, few, looked over before use; and an entry that can be continued."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bfpo_exp.config.training import Optimisation
from bfpo_exp.errors import UserError
from bfpo_exp.store import Store
from bfpo_exp.train.checkpoints import Checkpoints
from bfpo_exp.train.engine import PlainEngine
from bfpo_exp.train.loop import Objective, Sums, train

OPTIMISATION = Optimisation.model_validate(
    {
        "trainable": "all", "steps": 12, "epochs": None, "batch": 2, "microbatch": 1, "lr": 0.1,
        "schedule": "cosine", "warmup": 0.25, "weight_decay": 0.01, "betas": [0.9, 0.99], "clip": 0.5,
        "log_every": 5, "optimizer": "adamw", "gradient_checkpointing": False, "checkpoint_every": 3,
        "keep_checkpoints": 2,
    }
)  # fmt: skip


class Fit(Objective[Tensor]):
    """Least squares on points that are a function of the step."""

    rows = 100

    def microbatches(self, step: int) -> Any:
        generator = torch.Generator().manual_seed(step)
        return iter(torch.randn(2, 3, generator=generator))

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Sums]:
        loss = (model(batch) - batch.sum()) ** 2
        return loss.squeeze() / 2, Sums({"loss": (loss.detach().squeeze(), torch.tensor(1))})


def engine_of(dtype: torch.dtype = torch.float32) -> PlainEngine:
    torch.manual_seed(0)
    module = nn.Linear(3, 1).to(dtype)
    if dtype != torch.float32:
        module.forward = lambda x, forward=module.forward: forward(x.to(dtype)).float()  # type: ignore[method-assign]
    return PlainEngine(module, list(module.parameters()), OPTIMISATION, 12)


def trained(
    folder: Path, steps: int = 12, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], list[tuple[int, dict[str, float]]]]:
    engine, log = engine_of(dtype), []
    checkpoints = Checkpoints(folder, every=3, keep=2, identity="fit")
    train(engine, Fit(), steps, 5, lambda taken, v: log.append((taken, dict(v))), checkpoints=checkpoints)
    return dict(engine.module.state_dict()), log


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_continued_stage_ends_bit_for_bit_where_a_whole_one_does(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Logged means too, whose window the checkpoint after step 9 cuts in two."""
    whole, log = trained(tmp_path / "whole", dtype=dtype)
    checkpoints = Checkpoints(tmp_path / "cut", every=3, keep=2, identity="fit")
    engine = engine_of(dtype)

    class Cut(Exception):
        pass

    def die(taken: int) -> None:
        if engine.schedule.last_epoch >= 10:
            raise Cut

    with pytest.raises(Cut):
        train(engine, Fit(), 12, 5, lambda taken, v: None, die, checkpoints)
    assert sorted(os.listdir(tmp_path / "cut")) == ["step-000000006", "step-000000009"]
    rest, rest_log = trained(tmp_path / "cut", dtype=dtype)
    assert all(torch.equal(rest[name], tensor) for name, tensor in whole.items())
    assert rest_log == [entry for entry in log if entry[0] > 9]


def saved(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, every=1, keep=2, identity="fit")
    for step in steps:
        checkpoints.save(engine_of(), step, {"window": {}})
    return checkpoints


def test_no_checkpoint_is_the_beginning(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", 1, 2, "fit").resume(engine_of()) == (0, {})


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("bfpo_exp"), "propagate", True)
    checkpoints = saved(tmp_path, 1, 2)
    file = tmp_path / "step-000000002" / "engine.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert checkpoints.resume(engine_of())[0] == 1
    assert f"{file} is damaged" in caplog.text
    (tmp_path / "step-000000001" / "state.json").write_text("{")
    assert checkpoints.resume(engine_of())[0] == 0
    assert "step-000000001/state.json is damaged" in caplog.text


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(UserError, match=r"step-000000001 is a checkpoint of another run \(fit, this is"):
        Checkpoints(tmp_path, 1, 2, "other").resume(engine_of())


def test_another_number_of_processes_is_refused_where_the_engine_cannot_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)
    state = json.loads((tmp_path / "step-000000001" / "state.json").read_text())
    (tmp_path / "step-000000001" / "state.json").write_text(json.dumps(state | {"processes": 4}))
    assert checkpoints.resume(engine_of())[0] == 1
    engine = engine_of()
    monkeypatch.setattr(engine, "any_world_size", False, raising=False)
    with pytest.raises(UserError, match="was written by 4 processes, and this run has 1"):
        checkpoints.resume(engine)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = saved(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "engine.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    engine = engine_of()
    monkeypatch.setattr(engine, "save", full)
    with pytest.raises(UserError, match=r"No space left on device.*step-000000001, is whole: make room"):
        checkpoints.save(engine, 2, {})
    assert os.listdir(tmp_path) == ["step-000000001"]
    assert checkpoints.resume(engine_of())[0] == 1


def test_a_resumable_entry_keeps_what_a_failure_left(tmp_path: Path) -> None:
    store, made_of = Store(tmp_path), {"a": 1}

    def fail(folder: Path) -> None:
        (folder / "half").write_text("of it")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.get("kind", made_of, fail, resumable=True)
    found = []
    entry = store.get("kind", made_of, lambda folder: found.extend(os.listdir(folder)), resumable=True)
    assert found == ["half"]
    assert (entry / "half").read_text() == "of it"
