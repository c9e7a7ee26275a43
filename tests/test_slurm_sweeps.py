"""Sweeps on a real SLURM of two nodes, and what may happen to them: nothing is lost, nothing done twice."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_support import Server
from slurm_support import Slurm

from bfpo_exp.heartbeat import last_beat
from bfpo_exp.sweep.manifest import Manifest, find
from bfpo_exp.sweep.slurm_jobs import job_name
from bfpo_exp.sweep.state import Ending, job_states

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
DEADLINE = 300.0  # seconds
STEPS = 200
LAUNCHER = ["-m", "hydra/launcher=slurm", "experiment=smoke"]
# One stage that all jobs share, and one that can be caught in its middle.
TRAINED = [
    *LAUNCHER,
    "stages=[base,preference]",
    "train.reference=live",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.checkpoint_every=40",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "runs"


def command(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def handed_in(*words: str) -> Manifest:
    """A sweep that SLURM has."""
    assert "handed in to SLURM" in command("bfpo_exp", *words)
    return find(None)


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


def ended(manifest: Manifest) -> str:
    """Wait until SLURM has nothing of the sweep any more; what `bfpo-sweep status` says then."""
    prefix = job_name(manifest, 0).removesuffix("0")
    until(lambda: prefix not in subprocess.check_output(["squeue", "-h", "-o", "%j"], text=True))
    return command("bfpo_exp.sweep", "status")


def job_id(manifest: Manifest, array: int, index: int) -> str:
    """The id under which SLURM has a job."""
    told = subprocess.check_output(["squeue", "-h", "-r", "-o", "%j|%K|%i"], text=True).splitlines()
    (found,) = [
        line.split("|")[2] for line in told if line.startswith(f"{job_name(manifest, array)}|{index}|")
    ]
    return found


def steps_logged(run_dir: Path) -> Counter[int]:
    """How often each step of the preference stage stands in a run's metrics."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return Counter(entry["step"] for entry in whole if "train/loss" in entry["metrics"])


def in_the_middle(manifest: Manifest, number: int, since: int = 0) -> int | None:
    """The step that a job has come to, if that is beyond its first checkpoint and far from its end."""
    step = len(steps_logged(manifest.run_dir(number)))
    assert step < STEPS - 10, "it was not caught"
    return step if step > max(45, since) else None


def said(manifest: Manifest, number: int, words: str) -> int:
    return (manifest.job_dir(number) / "job.log").read_text().count(words)


def assert_complete(manifest: Manifest, uri: str | None = None, steps: int = STEPS) -> None:
    """Every job is done; every run stands once in MLflow, with every metric once."""
    manifest = Manifest.load(manifest.folder)
    assert {state.state for state in job_states(manifest)} == {"finished"}
    from bfpo_exp.tracking.client import connect
    from bfpo_exp.tracking.params import mlflow_name

    client = connect(uri or f"sqlite:///{os.environ['BFPO_EXP_HOME']}/mlflow.db")
    experiment = client.get_experiment_by_name("bfpo-exp")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(manifest.jobs)
    assert {run.info.status for run in runs} == {"FINISHED"}
    children = {run.data.tags.get("config_hash"): run for run in runs}
    for number in manifest.numbers:
        run_dir = manifest.run_dir(number)
        assert steps_logged(run_dir) == Counter(range(1, steps + 1))
        child = children[run_dir.name]
        assert child.data.tags["mlflow.parentRunId"] == manifest.parent_id
        assert child.data.tags["slurm.job_id"]
        written: Counter[tuple[str, int]] = Counter()
        for line in (run_dir / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            written.update((mlflow_name(name), entry["step"]) for name in entry["metrics"])
        assert set(written.values()) == {1}
        for name in {name for name, _ in written}:
            history = client.get_metric_history(child.info.run_id, name)
            assert sorted(m.step for m in history) == sorted(step for n, step in written if n == name)
    policies = list((Path(os.environ["BFPO_EXP_HOME"]) / "store" / "policy").glob("[!.]*"))
    assert len(policies) == len(manifest.jobs)


# ---------------------------------------------------------------- the same as elsewhere


def test_a_sweep_equals_the_same_on_one_machine(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The submitting shell is killed at once, and a config file edited while jobs wait in the queue."""
    mine = tmp_path / "conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\ntrain: { steps: 8, log_every: 1 }\n")
    words = [
        "--config-dir", str(tmp_path / "conf"), "-m", "experiment=[smoke,mine]",
        "loss.alpha=0.0,0.25,0.5,0.75", "loss.beta=0.2,1.0",
    ]  # fmt: skip
    on_slurm = ["hydra/launcher=slurm", "hydra.launcher.array_parallelism=2", "hydra.launcher.runs_per_job=2"]
    shell = subprocess.Popen(
        [sys.executable, "-m", "bfpo_exp", *words, *on_slurm],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert shell.stdout is not None
    assert "8 runs handed in to SLURM" in shell.stdout.readline()
    os.killpg(shell.pid, signal.SIGKILL)
    mine.write_text("# @package _global_\ntrain: { steps: 3, lr: 7.0 }\n")
    manifest = find(None)
    most = 0
    while any(state.state not in ("finished", "failed") for state in job_states(manifest)):
        most = max(most, sum(s.state == "running" for s in job_states(manifest)))
        time.sleep(1.0)
    assert 1 <= most <= 2
    assert "8 runs, of which 0 reused and 0 failed" in ended(manifest)
    assert_complete(manifest, steps=8)
    (sft,) = (home / "store" / "sft").glob("[!.]*")
    assert all("waiting for another" not in log.read_text() for log in manifest.folder.glob("*/job.log"))
    assert sft.stat().st_mtime < min((manifest.job_dir(n) / "job.log").stat().st_ctime for n in range(8))

    mine.write_text("# @package _global_\ntrain: { steps: 8, log_every: 1 }\n")
    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path / "local"))
    command("bfpo_exp", *words)
    assert table(find(None)) == table(manifest)


def table(manifest: Manifest) -> list[dict[str, str]]:
    with (manifest.folder / "comparison" / "table.csv").open() as file:
        return list(csv.DictReader(file))


BREAK = """\
import os
if os.environ.get("RANK") == "3":
    from bfpo_exp.train.preference import PreferenceObjective as Objective
    calls, loss = [], Objective.loss
    def broken(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("this GPU has fallen off the bus")
        return loss(*arguments)
    Objective.loss = broken
"""


def test_two_nodes_with_two_processes_each_equal_one(
    home: Path, slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first try, a process on the other node than the main one fails: the run says why.  At the second
    that node dies.
    """
    pytest.importorskip("deepspeed")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(BREAK)
    setup = f'test ! -d {broken} || export PYTHONPATH="{broken}:$PYTHONPATH"'
    words = ["stages=[base,sft,reference,preference]", f"train.steps={STEPS}", "train.log_every=1"]
    manifest = handed_in(
        *LAUNCHER, *words, "deepspeed=zero2", "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=2",
        f"hydra.launcher.setup=['{setup}']", "train.checkpoint_every=40",
    )  # fmt: skip
    until(lambda: Ending.of(manifest.job_dir(0)))
    assert "0 reused and 1 failed" in ended(manifest)
    assert job_states(manifest)[0].reason == "process 3: RuntimeError: this GPU has fallen off the bus"
    (broken / "sitecustomize.py").unlink(), broken.rmdir()
    command("bfpo_exp.sweep", "resume")
    until(lambda: in_the_middle(manifest, 0))
    slurm.kill_node("n2")
    until(lambda: " waits: " in job_states(manifest)[0].reason)  # SLURM has seen it
    slurm.start_node("n2")
    assert "1 run, of which 0 reused and 0 failed" in ended(manifest)
    assert said(manifest, 0, "continuing after step") >= 1
    assert_complete(manifest)

    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path / "one"))
    command("bfpo_exp", *LAUNCHER[2:], *words)
    (one,) = (tmp_path / "one" / "run").glob("*")
    expected, found = losses(one), losses(manifest.run_dir(0))
    assert found.keys() == expected.keys()
    assert len([key for key in found if key[0] == "train/loss"]) == STEPS
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {(n, e["step"]): v for e in entries for n, v in e["metrics"].items() if n.endswith("/loss")}


@pytest.mark.parametrize("script", ["srun", "torchrun"])
def test_one_run_on_two_nodes_without_the_launcher(
    script: str, home: Path, slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    file = Path(__file__).parents[1] / "launchers" / "slurm" / f"{script}.sbatch"
    each = ["--ntasks-per-node=1", "--gpus-per-node=1", f"--output={tmp_path / 'log'}"]
    words = ["experiment=smoke", "stages=[base]", "train.base.log_every=1"]
    told = subprocess.check_output(["sbatch", "--parsable", "--wait", *each, file, *words], text=True)
    assert told.strip().isdecimal()
    text = (tmp_path / "log").read_text()
    assert text.count("bfpo, seed 0:") == 1, text
    (run_dir,) = (home / "run").glob("*")
    assert json.loads((run_dir / "status.json").read_text()) == {"status": "finished"}
    assert json.loads((run_dir / "tags.json").read_text())["slurm.nodes"] == "n[1-2]"


# ---------------------------------------------------------------- faults


def test_jobs_that_fail_are_killed_or_are_requeued(home: Path) -> None:
    """Of four: one finds the disk full, one raises, one is SIGKILLed, one requeued by hand.

    Of that one the processes are then told to end, and the job is not.
    """
    manifest = handed_in(*TRAINED, "seed=0,1,2,3")
    full, raises = (manifest.run_dir(n) / "artifacts" / "dataset_card.md" for n in (0, 1))
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    raises.mkdir(parents=True)
    requeued_at = until(lambda: in_the_middle(manifest, 3))
    subprocess.run(["scontrol", "requeue", job_id(manifest, 1, 3)], check=True)
    until(lambda: in_the_middle(manifest, 2))
    kill(manifest, 2)
    until(lambda: said(manifest, 3, "continuing after step"))
    assert continued_after(manifest, 3) >= requeued_at, "from a checkpoint of the step that it was at"
    signalled_at = until(lambda: in_the_middle(manifest, 3, since=requeued_at + 5))
    subprocess.run(["scancel", "--signal=TERM", job_id(manifest, 1, 3)], check=True)
    out = ended(manifest)
    assert "4 runs, of which 0 reused and 3 failed" in out
    assert "OSError: [Errno 28] No space left on device" in out
    assert "IsADirectoryError: [Errno 21] Is a directory" in out
    assert "its process was ended by SIGKILL (out of memory?)" in out
    assert [state.state for state in job_states(manifest)] == ["failed", "failed", "failed", "finished"]
    assert said(manifest, 3, "continuing after step") == 2
    assert continued_after(manifest, 3) >= signalled_at
    assert "No space left" in command("bfpo_exp.sweep", "logs", "0")

    full.unlink(), raises.rmdir()
    assert "3 runs handed in" in command("bfpo_exp.sweep", "resume")
    assert "being done already: SLURM has " in command("bfpo_exp.sweep", "resume", code=2)
    assert "4 runs, of which 0 reused and 0 failed" in ended(manifest)
    assert said(manifest, 2, "continuing after step") == 1
    assert_complete(manifest)
    assert command("bfpo_exp.sweep", "sync").endswith("MLflow has all there is\n")
    assert_complete(manifest)


def kill(manifest: Manifest, number: int) -> None:
    """SIGKILL the process that does a job, which lives among the numbers of its node."""
    beat = last_beat(manifest.run_dir(number))
    assert beat is not None
    words = f"sweep.job {manifest.folder} {number}"
    found = subprocess.check_output(["pgrep", "-f", f"python.* -m bfpo_exp.{words}$"], text=True)
    pids = [pid for pid in found.split() if "srun" not in Path(f"/proc/{pid}/comm").read_text()]
    (pid,) = pids
    os.kill(int(pid), signal.SIGKILL)


def continued_after(manifest: Manifest, number: int) -> int:
    """The step of the checkpoint that a job last went on from."""
    return int(
        (manifest.job_dir(number) / "job.log").read_text().rpartition("continuing after step ")[2].split()[0]
    )


def test_a_shared_stage_that_fails_and_a_sweep_that_is_cancelled(home: Path) -> None:
    """Runs that wait for what is shared say why they failed; cancelled ones go on from where they were.

    Before it is cancelled, the sweep makes way for a job of more priority.
    """
    home.mkdir()
    (home / "store").touch()
    words = ["seed=0,1", "hydra.launcher.array_parallelism=1", "hydra.launcher.wait=true"]
    out = command("bfpo_exp", *TRAINED, *words, code=1)
    assert "2 runs, of which 0 reused and 2 failed" in out
    manifest = find(None)
    reason = "what it shares with other jobs (base) failed: NotADirectoryError"
    assert all(state.reason.startswith(reason) for state in job_states(manifest))
    (home / "store").unlink()

    resumed = subprocess.Popen([sys.executable, "-m", "bfpo_exp.sweep", "resume"])
    preempted_at = until(lambda: in_the_middle(manifest, 0))
    urgent = ["--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=true"]
    subprocess.run(["sbatch", "--wait", *urgent], check=True)
    until(lambda: said(manifest, 0, "continuing after step"))
    assert continued_after(manifest, 0) >= preempted_at
    at = until(lambda: in_the_middle(manifest, 0, since=preempted_at + 5))
    assert "cancelled" in command("bfpo_exp.sweep", "cancel")
    # As a rule the other job has had its turn while this one was queued again.
    assert re.search(r"cancelled, 2 jobs: (1 finished, 1|2) lost", command("bfpo_exp.sweep", "list"))
    assert resumed.wait(DEADLINE) == 1
    assert "2 runs, of which 0 reused and 0 failed" in command("bfpo_exp.sweep", "resume")
    assert continued_after(manifest, 0) >= at
    assert_complete(manifest)


def test_a_node_dies_and_a_time_limit_comes_twice_while_the_server_is_away(
    home: Path, slurm: Slurm, server: Server
) -> None:
    """Each of two jobs has a node of its own: one is killed, on the other USR2 says that time is up."""
    uri = server.uri
    manifest = handed_in(
        *TRAINED, "seed=0,1", f"tracking.uri={uri}", "hydra.launcher.options={exclusive: true}"
    )
    until(lambda: in_the_middle(manifest, 0))
    beat = last_beat(manifest.run_dir(1)) or until(lambda: last_beat(manifest.run_dir(1)))
    server.down()
    first = until(lambda: in_the_middle(manifest, 0))
    time_is_up(manifest, 0)
    until(lambda: in_the_middle(manifest, 1))
    slurm.kill_node(beat[0].host)
    until(lambda: "SLURM job" in str(job_states(manifest)[0]))
    slurm.start_node(beat[0].host)
    second = until(lambda: in_the_middle(manifest, 0, since=first + 20))
    time_is_up(manifest, 0)
    server.up()
    out = ended(manifest)
    assert "2 runs, of which 0 reused and 0 failed" in out
    assert said(manifest, 0, "continuing after step") == 2
    assert continued_after(manifest, 0) >= second
    assert said(manifest, 1, "continuing after step") == 1
    assert_complete(manifest, uri)


def time_is_up(manifest: Manifest, number: int) -> None:
    """What SLURM does some time before a job's limit."""
    subprocess.run(["scancel", "--batch", "--signal=USR2", job_id(manifest, 1, number)], check=True)
