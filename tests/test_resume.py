"""Killed at any moment and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from process_support import entries, numbers

SUPPORT = Path(__file__).with_name("kill_support.py")
KILLS = 10


def done(home: Path, engine: str, kills: int) -> None:
    """The run, after so many kills."""
    result = subprocess.run(
        [sys.executable, str(SUPPORT), engine, str(kills)],
        env={**os.environ, "BFPO_EXP_HOME": str(home), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def weights(home: Path) -> dict[str, str]:
    """Digests of the weights of every stage."""
    files = (home / "store").glob("*/*/model.safetensors")
    return {f.parent.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_ten_kills_change_nothing(engine: str, tmp_path: Path) -> None:
    if engine != "none":
        pytest.importorskip("deepspeed")
    done(tmp_path / "whole", engine, 0)
    done(tmp_path / "killed", engine, KILLS)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert weights(tmp_path / "whole").keys() == {"base", "sft", "policy"}
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    times = Counter(
        (name, entry["step"]) for entry in entries(tmp_path / "killed") for name in entry["metrics"]
    )
    assert set(times.values()) == {1}, "no value stands twice"
    assert not list((tmp_path / "killed" / "store").glob("*/.*making")), "nothing half-made is left"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'killed' / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [1, *range(3, 91, 3)]
