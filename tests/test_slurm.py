"""What is asked of SLURM for a sweep, and what its queue and the runs' files say together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from app_support import Command
from omegaconf import OmegaConf
from slurm_support import Slurm

from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.heartbeat import HEARTBEAT, Beat
from bfpo_exp.paths import config_dir
from bfpo_exp.sweep import slurm_batch, slurm_queue
from bfpo_exp.sweep.manifest import Manifest
from bfpo_exp.sweep.slurm import planned_arrays
from bfpo_exp.sweep.slurm_jobs import Array, Task, hand_in, job_name, logs
from bfpo_exp.sweep.slurm_settings import SlurmSettings, checked_settings
from bfpo_exp.sweep.state import Ending, job_states

Configs = Callable[..., Config]
PRESETS = Path(__file__).parents[1] / "launchers" / "slurm" / "hydra" / "launcher"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path))
    return tmp_path


def settings(**changes: object) -> SlurmSettings:
    """The settings of the shipped config, with these changes."""
    shipped = OmegaConf.to_object(OmegaConf.load(config_dir() / "hydra" / "launcher" / "slurm.yaml"))
    assert isinstance(shipped, dict)
    shipped.pop("_target_")
    return checked_settings({str(name): value for name, value in shipped.items()} | changes)


@pytest.fixture
def sweep(home: Path, config: Configs) -> Callable[..., Manifest]:
    """A sweep on SLURM that is written down, with these jobs, none of which was begun."""

    def made(*jobs: str, **changes: object) -> Manifest:
        launcher = {"name": "slurm", **settings(**changes).model_dump()}
        manifest = Manifest(
            home / "sweep" / "s", 1e9, 1e9, ["bfpo-exp"], "code", "sqlite", "e", "parent", launcher
        )
        configs = [config(*job.split()) for job in jobs]
        manifest.add(
            (job, f"key{n}", config) for n, (job, config) in enumerate(zip(jobs, configs, strict=True))
        )
        manifest.save()
        return manifest

    return made


# ---------------------------------------------------------------- settings


def test_the_shipped_settings_leave_to_the_cluster_what_is_not_said() -> None:
    assert settings().resources() == ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"]


def test_a_process_a_gpu_unless_that_is_said() -> None:
    assert settings(nodes=2, gpus_per_node=4).processes == 8
    assert settings(nodes=2, gpus_per_node=0).processes == 2
    assert settings(gpus_per_node=4, tasks_per_node=1).processes == 1


def test_further_options_are_sbatchs_own() -> None:
    given = settings(
        partition="gpu", mem="64G", time=90, gpus_per_node=0,
        options={"exclude": "n7", "exclusive": True, "contiguous": False},
    )  # fmt: skip
    assert given.resources() == [
        "--partition=gpu", "--nodes=1", "--ntasks-per-node=1", "--mem=64G", "--time=90", "--exclude=n7",
        "--exclusive",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"time": "soon"}, r"hydra.launcher.time='soon' is not allowed: allowed are minutes, "),
        (
            {"mem": "64 GB"},
            r"hydra.launcher.mem='64 GB' is not allowed: allowed are a number with K, M, G or T",
        ),
        ({"nodes": 0}, r"hydra.launcher.nodes=0 is not allowed"),
        ({"partition": "gpu --exclusive"}, r"hydra.launcher.partition='gpu --exclusive' is not allowed"),
        ({"options": {"array": "0-9"}}, r"hydra.launcher.options: the launcher sets array itself"),
        ({"options": {"-x": "n1"}}, r"'-x' is no long option of sbatch"),
        ({"runs_per_job": 4, "gpus_per_node": 2}, r"runs_per_job=4 packs small runs into .* but a run has 2"),
        ({"qos": 3}, r"hydra.launcher.qos=3 is not allowed"),
    ],
)
def test_a_bad_setting_ends_in_one_line(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        settings(**changes)


@pytest.mark.parametrize("form", [30, "30", "2:30:00", "1-12", "1-12:30", "90:00"])
def test_times_are_written_as_slurm_reads_them(form: object) -> None:
    assert settings(time=form).time == str(form)


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.yaml")))
def test_presets_are_settings(preset: str, compose: Callable[..., Any]) -> None:
    words = [f"hydra/launcher={preset}", f"hydra.searchpath=[file://{PRESETS.parents[1]}]"]
    launcher = compose(*words, hydra_too=True).hydra.launcher
    values = OmegaConf.to_object(launcher)
    assert isinstance(values, dict)
    assert values.pop("_target_").endswith(".SlurmLauncher")
    assert checked_settings({str(name): value for name, value in values.items()}).resources()


# ---------------------------------------------------------------- what is handed in


def test_what_jobs_share_comes_first_and_runs_are_packed(sweep: Callable[..., Manifest]) -> None:
    manifest = sweep(
        "method=dpo",
        "method=dpo seed=1",
        "method=sft",
        "method=dpo_h",
        "method=dpo_h seed=1",
        "train.sft.seed=7",
    )
    models, references, runs = planned_arrays(manifest, manifest.numbers, 4)
    assert models == [Task((0, 1, 2, 3, 4), ("base", "sft"))]
    assert references == [
        Task((0, 1), ("base", "sft", "reference")),
        Task((3, 4), ("base", "sft", "reference")),
    ]
    assert runs == [Task((0, 1, 2, 3)), Task((4, 5))]
    assert planned_arrays(manifest, [5], 4) == [[Task((5,))]], "nothing is shared by one"


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The words that an sbatch gets which takes everything."""
    folder, heard = tmp_path / "bin", tmp_path / "heard"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\necho "$@" > {heard}\necho "17;cluster"\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return heard


def test_an_array_is_written_down_before_it_is_handed_in(
    sweep: Callable[..., Manifest], sbatch: Path
) -> None:
    manifest = sweep("seed=0", "seed=1")
    tasks = [Task((0,)), Task((1,))]
    given = settings(
        array_parallelism=2, nodes=2, gpus_per_node=4, setup=["module load cuda"], python="/my env/python"
    )
    assert hand_in(manifest, given, tasks, after="16") == "17"
    script = manifest.folder / "slurm" / "0.sh"
    assert sbatch.read_text().split() == ["--parsable", "--dependency=afterany:16", str(script)]
    assert Array.load(manifest, 0) == Array(tuple(tasks), nodes=2, processes=8, requeues=20)
    lines = script.read_text().splitlines()
    assert '#SBATCH "--array=0-1%2"' in lines
    assert '#SBATCH "--signal=B:USR2@120"' in lines
    assert f'#SBATCH "--output={manifest.folder}/slurm/0-%a.log"' in lines
    assert lines.index("module load cuda") < len(lines) - 1
    assert lines[-1] == f"exec '/my env/python' -m bfpo_exp.sweep.slurm_batch {manifest.folder} 0"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert hand_in(manifest, given, tasks) == "17"
    assert job_name(manifest, 0) != job_name(manifest, 1)
    (manifest.folder / "slurm" / "1-1.log").touch()
    assert [file.name for file in logs(manifest, 1)] == ["1-1.log"]
    assert logs(manifest, 0) == []


def test_no_slurm_on_this_machine(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    told = command("-m", "hydra/launcher=slurm", "experiment=smoke", "seed=0,1")
    assert "there is no sbatch on this machine" in told.line
    assert not list((tmp_path / "runs").glob("sweep/*/sweep.json"))


def test_a_batch_that_its_processes_cannot_share_is_refused(command: Command, sbatch: Path) -> None:
    words = [
        "-m",
        "hydra/launcher=slurm",
        "experiment=smoke",
        "train.batch=6",
        "train.microbatch=6",
        "seed=0,1",
    ]
    told = command(*words, "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=2")
    assert told.code == 2
    assert "the preference stage's batch of 6 cannot be shared out evenly over 4 processes" in told.err
    assert "--test-only" in sbatch.read_text(), "nothing was handed in"


def test_a_search_has_to_wait_for_scores(command: Command) -> None:
    words = [
        "-m",
        "hydra/launcher=slurm",
        "hydra/sweeper=optuna",
        "experiment=smoke",
        "loss.alpha=interval(0,1)",
    ]
    pytest.importorskip("optuna")
    told = command(*words)
    assert told.code == 2
    assert "set hydra.launcher.wait=true" in told.err


# ---------------------------------------------------------------- on the node


@pytest.fixture
def batch(
    sweep: Callable[..., Manifest], sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Manifest]:
    """A job of SLURM whose srun is a script that gets the numbers of the sweep's jobs as its last words."""

    def does(srun: str, *tasks: Task, restarts: int = 0, **changes: object) -> Manifest:
        manifest = sweep("seed=0", "seed=1", "seed=2")
        hand_in(manifest, settings(**changes), tasks)
        for name, text in (("srun", srun), ("scontrol", f'echo "$@" >> {sbatch}.scontrol')):
            file = sbatch.with_name("bin") / name
            file.write_text(f"#!/bin/bash\ncd {manifest.folder}\necho ${{@:6}} >> calls\n{text}\n")
            file.chmod(0o755)
        for name, value in {"ARRAY_JOB_ID": 12, "ARRAY_TASK_ID": 0, "RESTART_COUNT": restarts}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        handlers = [signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)]
        try:
            assert slurm_batch.main([str(manifest.folder), "0"]) == 0
        finally:
            for number, handler in zip((signal.SIGUSR2, signal.SIGTERM), handlers, strict=True):
                signal.signal(number, handler)
        return manifest

    return does


FINISH = 'for n in "${@:6}"; do echo \'{"status": "finished", "seconds": 1}\' > $n/outcome.json; done'


def test_a_job_of_a_pack_that_is_killed_costs_itself_alone(batch: Callable[..., Manifest]) -> None:
    manifest = batch(f"[ $(wc -l < calls) = 1 ] && exit 137\n{FINISH}", Task((0, 1, 2)), runs_per_job=3)
    endings = [Ending.of(manifest.job_dir(n)) for n in range(3)]
    reason = "its process was ended by SIGKILL (out of memory?)"
    assert endings == [Ending("failed", 0.0, reason), Ending("finished", 1.0), Ending("finished", 1.0)]
    assert (manifest.folder / "calls").read_text().splitlines() == ["0 1 2", "1 2"]


def test_what_is_left_at_the_time_limit_is_queued_again(batch: Callable[..., Manifest], sbatch: Path) -> None:
    words = f"trap '' USR2; kill -USR2 $PPID; sleep 0.5\nset -- ${{@:1:6}}\n{FINISH}"
    manifest = batch(words, Task((0, 1, 2)), runs_per_job=3)
    assert Path(f"{sbatch}.scontrol").read_text() == "requeue 12_0\n"
    assert [Ending.of(manifest.job_dir(n)) is None for n in range(3)] == [False, True, True]


def test_a_job_is_not_queued_again_for_ever(batch: Callable[..., Manifest], sbatch: Path) -> None:
    manifest = batch("kill -USR2 $PPID; sleep 0.5", Task((1,)), restarts=2, requeues=2)
    assert not Path(f"{sbatch}.scontrol").exists()
    ending = Ending.of(manifest.job_dir(1))
    assert ending is not None
    assert ending.reason == "its time was up, and it was queued again 2 times (requeues=2)"


def test_a_shared_stage_that_is_killed_fails_all_who_wait(batch: Callable[..., Manifest]) -> None:
    manifest = batch("exit 137", Task((0, 2), ("base", "sft")))
    reason = (
        "what it shares with other jobs (base,sft) failed: its process was ended by SIGKILL (out of memory?)"
    )
    assert [Ending.of(manifest.job_dir(n)) for n in range(3)] == [
        Ending("failed", 0.0, reason), None, Ending("failed", 0.0, reason),
    ]  # fmt: skip


# ---------------------------------------------------------------- states


def beat(manifest: Manifest, number: int, host: str, age: float) -> None:
    folder = manifest.run_dir(number)
    folder.mkdir(parents=True)
    (folder / HEARTBEAT).write_text(json.dumps(asdict(Beat(host, 7, "sft"))))
    os.utime(folder / HEARTBEAT, (time.time() - age, time.time() - age))


def test_files_say_it_first_and_slurm_what_they_cannot_know(
    sweep: Callable[..., Manifest], sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sweep(*(f"seed={n}" for n in range(8)))
    hand_in(manifest, settings(), [Task(tuple(range(8)), ("base",))])
    hand_in(manifest, settings(), [Task((n,)) for n in range(8)])
    name = job_name(manifest, 1)
    lines = [
        f"11_0|0|PENDING|Dependency||{job_name(manifest, 0)}", f"12_0|0|PENDING|Resources||{name}",
        f"12_1|1|RUNNING|None|n1|{name}", f"12_2|2|RUNNING|None|n2|{name}",
        f"12_3|3|PENDING|BeginTime||{name}", f"12_6|6|RUNNING|None|n1|{name}",
        "99_7|7|RUNNING|None|n1|another.sweep.1",
    ]  # fmt: skip
    monkeypatch.setattr(slurm_queue, "slurm", lambda *_: "\n".join(lines))
    beat(manifest, 2, "n2", age=1.0)
    beat(manifest, 3, "n2", age=1.0)  # it was requeued a moment ago
    beat(manifest, 4, "n2", age=1.0)  # killed a moment ago
    beat(manifest, 5, "n2", age=100.0)
    Ending("failed", 1.0, "the loss is nan").save(manifest.job_dir(6))
    found = [(state.state, str(state)) for state in job_states(manifest)]
    assert found == [
        ("queued", "SLURM job 12_0 waits: Resources"),
        ("queued", "SLURM job 12_1, running on n1"),
        ("running", "sft on n2"),
        ("queued", "SLURM job 12_3 waits: BeginTime"),
        ("lost", "was at sft on n2, process 7"),
        ("lost", "was at sft on n2, process 7"),
        ("failed", "the loss is nan"),
        ("lost", "SLURM has no job for it"),
    ]


def test_without_an_answer_from_slurm_there_are_the_files(
    sweep: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sweep("seed=0", "seed=1")
    beat(manifest, 1, "n2", age=1.0)
    monkeypatch.setenv("PATH", "/nowhere")
    assert [state.state for state in job_states(manifest)] == ["queued", "running"]


# ---------------------------------------------------------------- refusals of a real SLURM


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("partition=nope", "invalid partition specified: nope"),
        ("gpus_per_node=9", "configuration is not available"),
    ],
)
def test_what_slurm_refuses_is_said_before_anything_is_written(
    word: str, says: str, command: Command, slurm: Slurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path / "runs"))
    told = command("-m", "hydra/launcher=slurm", "experiment=smoke", "seed=0,1", f"hydra.launcher.{word}")
    assert told.line.startswith("bfpo-exp: SLURM refuses: ")
    assert says in told.line
    assert not list((tmp_path / "runs").glob("sweep/*/sweep.json"))
