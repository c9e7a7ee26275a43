"""Killed, doubled, started again: nothing is lost, nothing is done or told twice."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from process_support import entries, finish, numbers, start

pytestmark = pytest.mark.slow
SMOKE = ["experiment=smoke", "train.steps=30", "train.log_every=1"]


def test_a_killed_run_continues_where_the_store_stands(tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", *SMOKE))
    home = tmp_path / "killed"
    process = start(home, *SMOKE)
    for _ in range(2000):
        if list((home / "run").glob("*/metrics.jsonl")) and ("train/loss", 5) in numbers(home):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert ("train/loss", 5) in numbers(home), "killed in the middle of training"
    assert not any(name.startswith("eval/") for name, _ in numbers(home))

    assert "reused" not in finish(start(home, *SMOKE))
    assert numbers(home) == numbers(tmp_path / "whole")
    times = Counter((name, entry["step"]) for entry in entries(home) for name in entry["metrics"])
    assert set(times.values()) == {1}, "no value stands twice"
    assert not list((home / "store").glob("*/.*making*")), "nothing half-made is left"

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 31))


def test_two_processes_that_start_the_same_run_do_it_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, *SMOKE) for _ in range(2)]
    told = [finish(process) for process in processes]
    assert sorted("reused" in text for text in told) == [False, True]
    times = Counter((name, entry["step"]) for entry in entries(tmp_path) for name in entry["metrics"])
    assert set(times.values()) == {1}
