"""Sweeps whose jobs, workers, machine, disk or server fail: after one `resume` everything is there, once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from server_support import Server

from bfpo_exp.config.schema import Config
from bfpo_exp.heartbeat import HEARTBEAT
from bfpo_exp.sweep.manifest import MANIFEST, Manifest, find
from bfpo_exp.sweep.state import job_states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS = 60
TRAINED = ["-m", "experiment=smoke", f"train.steps={STEPS}", "train.log_every=1", "train.checkpoint_every=10"]
FOUR = [*TRAINED, "seed=0,1,2,3", "hydra.launcher.n_jobs=2"]
BANDITS = ["-m", "experiment=bandit", "bandit.steps=20", "bandit.repeats=1", "bandit.methods=[dpo]"]
DEADLINE = 300.0  # seconds


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, config: Callable[..., Config]) -> Path:
    """A runs root with a tracking store and all that the runs here share, so that each test need not wait."""
    from bfpo_exp.run import make_ahead
    from bfpo_exp.tracking.store import prepare

    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BFPO_EXP_HOME", str(root))
        smoke = config("experiment=smoke")
        prepare(smoke.tracking, root)
        make_ahead(smoke, ["base", "sft", "reference"])
    return root


@pytest.fixture(autouse=True)
def home(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "runs"
    shutil.copytree(prepared, root)
    monkeypatch.setenv("BFPO_EXP_HOME", str(root))
    return root


def start(*words: str) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == code, out
    return out


def resumed(code: int = 0) -> str:
    return end(start("bfpo_exp.sweep", "resume"), code)


def until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return found


def steps_logged(run_dir: Path) -> Counter[int]:
    """How often each step of the preference stage stands in a run's metrics."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return Counter(entry["step"] for entry in whole if "train/loss" in entry["metrics"])


def in_the_middle(home: Path) -> Path | None:
    """The folder of a run that has a checkpoint of its preference stage, and steps to go."""
    runs = [file.parent for file in (home / "run").glob(f"*/{HEARTBEAT}")]
    return next((run for run in runs if 12 <= len(steps_logged(run)) <= STEPS - 20), None)


def processes_of(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(number) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def assert_complete(jobs: int = 4, uri: str | None = None) -> None:
    """Every job is done; every run stands once in MLflow, with every metric once."""
    manifest = find(None)
    assert [state.state for state in job_states(manifest)] == ["finished"] * jobs
    from bfpo_exp.tracking.client import connect
    from bfpo_exp.tracking.params import mlflow_name

    client = connect(uri or f"sqlite:///{os.environ['BFPO_EXP_HOME']}/mlflow.db")
    experiment = client.get_experiment_by_name("bfpo-exp")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if run.data.tags["bfpo.kind"] == "sweep"]
    assert parent.info.run_id == manifest.parent_id
    children = {run.data.tags["config_hash"]: run for run in runs if run is not parent}
    assert len(runs) == jobs + 1
    for number in range(jobs):
        run_dir = manifest.run_dir(number)
        child = children[run_dir.name]
        assert child.data.tags["mlflow.parentRunId"] == manifest.parent_id
        written: Counter[tuple[str, int]] = Counter()
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            written.update((mlflow_name(name), entry["step"]) for name in entry["metrics"])
        assert set(written.values()) == {1}
        for name in {name for name, _ in written}:
            history = client.get_metric_history(child.info.run_id, name)
            assert sorted(m.step for m in history) == sorted(step for n, step in written if n == name)
    if (trained := manifest.config(0).stages) != ["bandit"]:
        assert "preference" in trained
        assert all(set(steps_logged(manifest.run_dir(n))) == set(range(1, STEPS + 1)) for n in range(jobs))
        policies = list((Path(os.environ["BFPO_EXP_HOME"]) / "store" / "policy").glob("[!.]*"))
        assert len(policies) == jobs


def said(manifest: Manifest, words: str) -> int:
    """How often words stand in the logs of a sweep's jobs."""
    return sum(log.read_text().count(words) for log in manifest.folder.glob("*/job.log"))


# ---------------------------------------------------------------- one job


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda file: file.symlink_to("/dev/full"), "OSError: [Errno 28] No space left on device"),
        (lambda file: file.mkdir(), "IsADirectoryError: [Errno 21] Is a directory"),
    ],
    ids=["the disk is full", "it raises"],
)
def test_a_job_that_fails_takes_no_other_down(home: Path, block: Callable[[Path], None], reason: str) -> None:
    first = start("bfpo_exp", *BANDITS, "seed=0,1,2", "hydra.launcher.n_jobs=1", "hydra.launcher.retries=1")
    until(lambda: list(home.glob(f"sweep/*/{MANIFEST}")), first)
    obstacle = find(None).run_dir(1) / "bandit.csv"
    obstacle.parent.mkdir(parents=True)
    block(obstacle)
    out = end(first, 1)
    assert "3 runs, of which 0 reused and 1 failed" in out
    assert f"{obstacle.parent}: {reason}" in out
    assert f"resume {find(None).name}" in out
    assert said(find(None), "Traceback") == 0
    assert reason in (obstacle.parent / "artifacts" / "traceback.txt").read_text()
    told = subprocess.run(
        [sys.executable, "-m", "bfpo_exp.sweep", "logs", "1"], capture_output=True, text=True, check=True
    )
    assert reason in told.stdout

    assert "3 runs, of which 0 reused and 1 failed" in resumed(1), "the obstacle is still there"
    obstacle.unlink() if obstacle.is_symlink() else obstacle.rmdir()
    assert "3 runs, of which 0 reused and 0 failed" in resumed()
    assert_complete(3)


def test_no_job_begins_after_a_failure_with_fail_fast(home: Path) -> None:
    words = ["bandit.steps=20,21,22", "hydra.launcher.n_jobs=1", "hydra.launcher.fail_fast=true"]
    first = start("bfpo_exp", *BANDITS, *words)
    until(lambda: list(home.glob(f"sweep/*/{MANIFEST}")), first)
    obstacle = find(None).run_dir(0) / "bandit.csv"
    obstacle.mkdir(parents=True)
    assert "3 runs, of which 0 reused and 1 failed, 2 not done" in end(first, 1)
    obstacle.rmdir()
    resumed()
    assert_complete(3)


@pytest.mark.parametrize("retries", [0, 1])
def test_a_killed_worker_costs_one_try_of_one_job(home: Path, retries: int) -> None:
    sweep = start("bfpo_exp", *FOUR, f"hydra.launcher.retries={retries}")
    run_dir = until(lambda: in_the_middle(home), sweep)
    os.kill(json.loads((run_dir / HEARTBEAT).read_text())["pid"], signal.SIGKILL)
    out = end(sweep, 0 if retries else 1)
    if not retries:
        assert "4 runs, of which 0 reused and 1 failed" in out
        assert f"{run_dir}: its process was ended by SIGKILL (out of memory?)" in out
        assert "4 runs, of which 0 reused and 0 failed" in resumed()
    assert said(find(None), "continuing after step") == 1
    assert_complete()


# ---------------------------------------------------------------- the whole of it


def interrupt(sweep: subprocess.Popen[str]) -> None:
    """Ctrl-C: the terminal signals every process."""
    os.killpg(sweep.pid, signal.SIGINT)
    began = time.monotonic()
    out = end(sweep, 130)
    assert time.monotonic() - began < 30
    assert "interrupted" in out
    assert f"resume {find(None).name}" in out
    assert "Traceback" not in out
    assert parent_status() == "KILLED"


def cancel(sweep: subprocess.Popen[str]) -> None:
    end(start("bfpo_exp.sweep", "cancel"))
    end(sweep, 130)
    assert (
        "cancelled"
        in subprocess.run(
            [sys.executable, "-m", "bfpo_exp.sweep", "list"], capture_output=True, text=True, check=True
        ).stdout
    )
    assert parent_status() == "KILLED"


def kill_all(sweep: subprocess.Popen[str]) -> None:
    os.killpg(sweep.pid, signal.SIGKILL)
    sweep.communicate()


def kill_the_parent(sweep: subprocess.Popen[str]) -> None:
    sweep.kill()
    sweep.communicate()


def parent_status() -> str:
    from bfpo_exp.tracking.client import connect

    client = connect(f"sqlite:///{os.environ['BFPO_EXP_HOME']}/mlflow.db")
    return str(client.get_run(find(None).parent_id).info.status)


@pytest.mark.parametrize("stop", [interrupt, cancel, kill_all, kill_the_parent])
def test_a_sweep_that_was_stopped_goes_on(home: Path, stop: Callable[[subprocess.Popen[str]], None]) -> None:
    sweep = start("bfpo_exp", *FOUR)
    until(lambda: in_the_middle(home), sweep)
    stop(sweep)
    until(lambda: not processes_of(sweep.pid))
    states = {state.state for state in job_states(find(None))}
    assert "lost" in states
    assert "running" not in states
    assert "4 runs, of which 0 reused and 0 failed" in resumed()
    assert said(find(None), "continuing after step") >= 1
    assert_complete()


def test_configs_that_are_edited_while_jobs_wait_change_nothing(home: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "conf" / "experiment" / "mine.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text("# @package _global_\nbandit: { lr: 0.02 }\n")
    words = ["--config-dir", str(tmp_path / "conf"), "-m", "experiment=[bandit,mine]", *BANDITS[2:]]
    sweep = start("bfpo_exp", *words, "seed=0,1,2", "hydra.launcher.n_jobs=1")
    until(lambda: list(home.glob(f"sweep/*/{MANIFEST}")), sweep)
    experiment.write_text("# @package _global_\nbandit: { lr: 7.0 }\n")
    end(sweep)
    configs = [(find(None).run_dir(n) / "config.yaml").read_text() for n in range(3)]
    assert all("lr: 0.02" in config.partition("bandit:")[2] for config in configs)
    assert_complete(3)


def test_code_that_changed_stops_a_resume_until_it_is_forced(home: Path) -> None:
    sweep = start("bfpo_exp", *BANDITS, "seed=0,1,2,3", "hydra.launcher.n_jobs=1")
    until(lambda: len(list(home.glob("sweep/*/*/outcome.json"))) >= 2, sweep)
    kill_all(sweep)
    manifest = find(None)
    done = [state.number for state in job_states(manifest) if state.state == "finished"]
    manifest.code = "of another day"
    manifest.save()
    assert "the code has changed since the sweep" in resumed(2)
    assert "4 runs, of which 0 reused and 0 failed" in end(start("bfpo_exp.sweep", "resume", "--force"))
    assert find(None).code != "of another day"
    assert [state.state for state in job_states(find(None))] == ["finished"] * 4
    assert {0, 1} <= set(done)


# ---------------------------------------------------------------- several at once


def test_a_run_that_another_process_does_is_put_off(home: Path) -> None:
    sweep = start("bfpo_exp", *BANDITS, "seed=0,1,2", "hydra.launcher.n_jobs=1")
    until(lambda: list(home.glob(f"sweep/*/{MANIFEST}")), sweep)
    manifest = find(None)
    manifest.run_dir(0).mkdir(parents=True)
    with FileLock(manifest.run_dir(0) / ".lock"):
        until(lambda: all((manifest.job_dir(n) / "outcome.json").exists() for n in (1, 2)), sweep)
        assert not (manifest.job_dir(0) / "outcome.json").exists()
    end(sweep)
    assert_complete(3)


def test_two_who_start_the_same_sweep_share_its_runs(home: Path) -> None:
    both = [start("bfpo_exp", *FOUR[:-1], "hydra.launcher.n_jobs=1") for _ in range(2)]
    told = [end(sweep) for sweep in both]
    reused = [int(out.partition("4 runs, of which ")[2].split()[0]) for out in told]
    assert sum(reused) == 4
    runs = list((home / "run").iterdir())
    assert len(runs) == 4
    for run in runs:
        assert steps_logged(run) == Counter(range(1, STEPS + 1))


def test_a_sweep_is_done_by_one_process(home: Path) -> None:
    sweep = start("bfpo_exp", *FOUR)
    until(lambda: in_the_middle(home), sweep)
    assert f"is being done already, by process {sweep.pid}" in resumed(2)
    end(sweep)
    assert_complete()


# ---------------------------------------------------------------- many


def resident(group: int) -> float:
    """Memory that the processes of a group hold, in MB."""
    held = 0.0
    for process in processes_of(group):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            status = Path(f"/proc/{process}/status").read_text()
            if "VmRSS:" in status:  # one that is ending has none
                held += float(status.partition("VmRSS:")[2].split()[0]) / 1e3
    return held


def test_a_hundred_trivial_jobs_cost_no_memory(home: Path) -> None:
    words = ["-m", "experiment=smoke", "stages=[base]", "seed=range(0,100)", "hydra.launcher.n_jobs=2"]
    sweep = start("bfpo_exp", *words)
    ended = lambda: list(home.glob("sweep/*/*/outcome.json"))  # noqa: E731
    until(lambda: len(ended()) >= 30, sweep)
    before = resident(sweep.pid)
    until(lambda: len(ended()) >= 90, sweep)
    grown = resident(sweep.pid) - before
    end(sweep)
    assert grown < 60
    assert {state.state for state in job_states(find(None))} == {"finished"}


# ---------------------------------------------------------------- the tracking server


def test_a_tracking_server_that_dies_and_comes_back_loses_nothing(home: Path, server: Server) -> None:
    uri = server.uri
    sweep = start("bfpo_exp", *FOUR, f"tracking.uri={uri}")
    until(lambda: in_the_middle(home), sweep)
    server.down()
    until(lambda: list(home.glob("sweep/*/*/outcome.json")), sweep)
    server.up()
    end(sweep)
    resumed()
    assert_complete(uri=uri)
