"""What a sweep writes down, what its files say of its jobs, and how they are shared out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from omegaconf import OmegaConf

from bfpo_exp import heartbeat
from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.heartbeat import HEARTBEAT, STALE, Beat, Heartbeat, living
from bfpo_exp.sweep.cli import main
from bfpo_exp.sweep.manifest import CANCELLED, FROZEN, Manifest, find
from bfpo_exp.sweep.shared import Shared, shared_stages
from bfpo_exp.sweep.state import OUTCOME, Ending, job_states, summary, unfinished
from bfpo_exp.sweep.workers import shares

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from omegaconf import DictConfig

HEAVY = ("torch", "transformers", "mlflow", "datasets", "pandas", "hydra")
HERE = socket.gethostname()
Configs = Callable[..., Config]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def sweep(home: Path, config: Configs) -> Callable[..., Manifest]:
    """Sweeps that are written down, with jobs of seeds 0, 1, ..., none of which was begun."""

    def made(name: str = "s", jobs: int = 6, created: float = 1e9) -> Manifest:
        manifest = Manifest(
            home / "sweep" / name, created, created, ["bfpo-exp", "-m", "seed=0,1"], "code", "sqlite", "e",
            "parent", {"name": "local", "n_jobs": None, "retries": 0, "fail_fast": False},
        )  # fmt: skip
        base = config()
        manifest.add((f"seed={n}", f"key{n}", base.model_copy(update={"seed": n})) for n in range(jobs))
        manifest.save()
        return manifest

    return made


def run_folder(manifest: Manifest, number: int) -> Path:
    folder = manifest.run_dir(number)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def end(manifest: Manifest, number: int, status: str, reason: str = "") -> None:
    (run_folder(manifest, number) / "status.json").write_text(json.dumps({"status": "finished"}))
    Ending(status, 3.2, reason).save(manifest.job_dir(number))  # type: ignore[arg-type]


def beat(manifest: Manifest, number: int, beat: Beat, at: float | None = None) -> None:
    file = run_folder(manifest, number) / HEARTBEAT
    file.write_text(json.dumps(asdict(beat)))
    if at is not None:
        os.utime(file, (at, at))


def dead_process(reaped: bool = True) -> int:
    process = subprocess.Popen(["true"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()
    if reaped:
        process.wait()
    else:
        time.sleep(0.1)
    return process.pid


# ---------------------------------------------------------------- the manifest


def test_a_config_comes_back_as_it_was_frozen(sweep: Callable[..., Manifest], config: Configs) -> None:
    manifest = Manifest.load(sweep().folder)
    assert manifest.config(3) == config().model_copy(update={"seed": 3})
    assert [(job.number, job.name) for job in manifest.jobs] == [(n, f"seed={n}") for n in range(6)]


def test_a_frozen_config_that_was_edited_is_refused(sweep: Callable[..., Manifest]) -> None:
    manifest = sweep()
    file = manifest.job_dir(2) / FROZEN
    file.write_text(file.read_text().replace('"threads": 1', '"threads": 2'))
    with pytest.raises(UserError, match=r"2/config.json was changed after the sweep began"):
        manifest.config(2)
    assert manifest.config(1).threads == 1


def test_a_sweep_is_found_by_name_by_folder_or_as_the_latest(
    sweep: Callable[..., Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"there is no sweep under .*; run one first"):
        find(None)
    sweep("early", created=1e9), sweep("late", created=2e9)
    assert find(None).name == "late"
    assert find("early").name == "early"
    assert find(str(find("early").folder)).name == "early"
    assert main(["status", "erly"]) == 2
    assert capsys.readouterr().err == (
        "bfpo-sweep: unknown sweep 'erly'; allowed: early, late; nearest: 'early'\n"
    )
    assert main(["logs", "early", "6"]) == 2
    assert "the sweep early has no job 6; allowed: 0 to 5" in capsys.readouterr().err


# ---------------------------------------------------------------- states


def test_the_files_of_jobs_say_how_they_stand(
    sweep: Callable[..., Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = sweep(jobs=9)
    end(manifest, 0, "finished")
    end(manifest, 1, "reused")
    end(manifest, 2, "failed", "the loss is nan at step 3")
    beat(manifest, 3, Beat(HERE, os.getpid(), "preference", 30, 120, 51.3, 754.0))
    beat(manifest, 4, Beat(HERE, dead_process(), "sft"))
    beat(manifest, 5, Beat("elsewhere", 1), at=time.time() - STALE - 1)
    beat(manifest, 6, Beat("elsewhere", 1))
    # An unfinished run of an earlier sweep, and a finished one that this sweep has not seen yet.
    beat(manifest, 7, Beat(HERE, dead_process()), at=manifest.started - 1)
    (run_folder(manifest, 8) / "status.json").write_text('{"status": "finished"}')

    states = job_states(manifest)
    told = ["finished", "reused", "failed", "running", "lost", "lost", "running", "queued", "queued"]
    assert [state.state for state in states] == told
    assert unfinished(states) == list(range(2, 9))
    assert summary(states) == "9 jobs: 1 finished, 1 reused, 2 running, 2 queued, 1 failed, 2 lost"
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "0  finished  seed=0  3 s" in out
    assert "2  failed    seed=2  the loss is nan at step 3" in out
    assert f"3  running   seed=3  preference step 30 of 120, 51.3 pairs/s, 12 m 34 s left on {HERE}" in out
    assert "4  lost      seed=4  was at sft on " in out
    assert out.startswith("sweep s: interrupted, 9 jobs")
    assert out.endswith("go on: bfpo-sweep resume s\n")


def test_a_process_that_ended_is_gone_before_its_parent_takes_note(tmp_path: Path) -> None:
    (tmp_path / HEARTBEAT).write_text(json.dumps(asdict(Beat(HERE, dead_process(reaped=False)))))
    assert living(tmp_path) is None


def test_a_run_whose_folder_is_gone_is_not_done(sweep: Callable[..., Manifest]) -> None:
    manifest = sweep(jobs=1)
    end(manifest, 0, "finished")
    (manifest.run_dir(0) / "status.json").unlink()
    assert [state.state for state in job_states(manifest)] == ["queued"]


def test_files_that_a_power_cut_has_emptied_are_as_if_missing(sweep: Callable[..., Manifest]) -> None:
    manifest = sweep(jobs=2)
    (manifest.job_dir(0) / OUTCOME).write_text("")
    (run_folder(manifest, 1) / HEARTBEAT).write_text("")
    assert [state.state for state in job_states(manifest)] == ["queued", "queued"]


def test_a_cancelled_sweep_says_so(
    sweep: Callable[..., Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep().folder / CANCELLED).touch()
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "s  cancelled, 6 jobs: 6 queued  -m seed=0,1\n"


def test_a_thousand_jobs_are_told_at_once_and_lightly(sweep: Callable[..., Manifest], home: Path) -> None:
    manifest = sweep(jobs=1000)
    for number in range(0, 900):
        end(manifest, number, "finished")
    for number in range(900, 950):
        beat(manifest, number, Beat(HERE, os.getpid()))
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from bfpo_exp.sweep.cli import main\n"
        "main(['status']); print(time.perf_counter() - start)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, seconds, heavy = done.stdout.splitlines()
    assert "1000 jobs: 900 finished, 50 running, 50 queued" in lines[0]
    assert len(lines) == 1000 + 2
    assert heavy == "[]"
    assert float(seconds) < 2


# ---------------------------------------------------------------- heartbeats


def test_a_heartbeat_lives_as_long_as_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)
    with Heartbeat(tmp_path) as told:
        told.enter("preference")
        told.at(10, 50, None)
        time.sleep(0.2)
        told.at(20, 50, 8.0)
        for _ in range(200):
            beat = living(tmp_path)
            assert beat is not None
            if beat.step == 20:
                break
            time.sleep(0.02)
        assert (beat.pid, beat.stage, beat.step, beat.steps, beat.speed) == (
            os.getpid(), "preference", 20, 50, 8.0,
        )  # fmt: skip
        assert beat.left == pytest.approx(0.6, rel=0.5)  # 30 steps at 10 steps in 0.2 s
    assert living(tmp_path) is None
    with pytest.raises(KeyboardInterrupt), Heartbeat(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / HEARTBEAT).exists(), "who was at work here, and came to no end"


# ---------------------------------------------------------------- composing, sharing out


@pytest.fixture(scope="module")
def loader() -> ConfigLoader:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from bfpo_exp.paths import config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return GlobalHydra.instance().config_loader()


@pytest.mark.parametrize(
    "jobs",
    [
        [["seed=0", "loss.beta=0.1"], ["seed=1", "loss.beta=0.2"], ["seed=1", "loss.beta=0.1"]],
        [["loss=dpo", "seed=1"], ["loss=bfpo", "loss.alpha=0.25"], ["loss=dpo", "seed=2"]],
        [["experiment=smoke", "train.steps=7"], ["method=dpo_h", "experiment=smoke"]],
        [["train.trainable=[mlp.down_proj,lm_head]", "model.architecture={hidden_size:8}"]],
        [["+model.architecture.rope_theta=5.0", "seed=3"], ["method=dpo", "~method"], ["++seed=4", "seed=5"]],
        [["experiment=bandit", "loss.b1=3.5", "bandit.taus=[0.5]"]],
    ],
)
def test_jobs_are_composed_as_hydra_composes_them(loader: ConfigLoader, jobs: list[list[str]]) -> None:
    from hydra.types import RunMode

    from bfpo_exp.sweep.compose import JobLoader

    master = loader.load_configuration("config", ["hydra/launcher=local"], RunMode.MULTIRUN)
    ours = JobLoader(loader)
    for job in jobs:
        expected, got = loader.load_sweep_config(master, job), ours.load_sweep_config(master, job)
        assert got.hydra.overrides.task == expected.hydra.overrides.task == job
        assert plain(got) == plain(expected)


def plain(composed: DictConfig) -> object:
    names = [str(name) for name in composed if name != "hydra"]
    return OmegaConf.to_container(OmegaConf.masked_copy(composed, names), resolve=True)


def test_a_wrong_value_is_told_by_hydra(loader: ConfigLoader) -> None:
    from hydra.errors import ConfigCompositionException
    from hydra.types import RunMode

    from bfpo_exp.sweep.compose import JobLoader

    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    with pytest.raises(ConfigCompositionException, match=r"Could not override 'loss.betta'"):
        JobLoader(loader).load_sweep_config(master, ["loss.betta=0.1"])


def test_cores_are_held_apart_where_each_stage_finds_enough(
    config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 5, 6, 7, 8, 9})
    monkeypatch.setattr("bfpo_exp.sweep.workers._gpus", lambda: 0)
    two = config("threads=2", "train.base.threads=2", "train.sft.threads=2")
    places = shares(None, [two] * 10)
    assert [place.cores for place in places] == [{0, 1}, {2, 5}, {6, 7}, {8, 9}]
    assert [place.cores for place in shares(3, [two] * 10)] == [{0, 1}, {2, 5}, {6, 7}]
    assert len(shares(None, [two] * 3)) == 3
    wide = config("threads=2", "train.base.threads=4")
    assert [place.cores for place in shares(None, [two, wide, two, two, two])] == [None] * 4


def test_each_worker_sees_one_gpu(config: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bfpo_exp.sweep.workers._gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place.gpu for place in shares(None, [config()] * 4)] == ["3", "5"]
    assert [place.gpu for place in shares(3, [config()] * 4)] == ["3", "5", "3"]


def test_what_a_sweep_shares(config: Configs) -> None:
    words = {
        0: ("method=dpo",),
        1: ("method=dpo", "seed=1"),
        2: ("method=sft",),
        3: ("method=dpo_h",),
        4: ("method=dpo_h", "seed=1"),
        5: ("method=dpo", "train.sft.seed=7"),
        6: ("method=dpo", "train.reference=live"),
    }
    found = shared_stages({number: config(*given) for number, given in words.items()})
    assert found == [
        Shared(("base", "sft"), (0, 1, 2, 3, 4, 6)),
        Shared(("base", "sft", "reference"), (0, 1), after=0),
        Shared(("base", "sft", "reference"), (3, 4), after=0),
    ]
