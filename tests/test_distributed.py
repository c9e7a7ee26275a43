"""Several processes that do one run, started as users start them, against one process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bfpo_exp.distributed import Group, alone, group

pytestmark = pytest.mark.distributed
RUN = [
    "experiment=smoke",
    "train.steps=50",
    "train.log_every=1",
    "train.trainable=all",
    "train.microbatch=2",
    "eval.sampling.temperature=0",
]


def run(home: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
        *("--no-python", sys.executable),
    ]
    return subprocess.run(
        [*(launcher if processes > 1 else [sys.executable]), "-m", "bfpo_exp", *arguments],
        env={**os.environ, "BFPO_EXP_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics(home: Path) -> dict[tuple[str, int], float]:
    (file,) = (home / "run").glob("*/metrics.jsonl")
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return {(n, e["step"]): v for e in entries for n, v in e["metrics"].items() if not n.startswith("perf/")}


def responses(home: Path) -> list[str]:
    (file,) = (home / "run").glob("*/artifacts/generations.json")
    table = json.loads(file.read_text())
    return [row[table["columns"].index("response")] for row in table["data"]]


@pytest.fixture(scope="module")
def alone_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("one")
    done = run(home, *RUN)
    assert done.returncode == 0, done.stderr
    return home


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["none", "zero1", "zero2", "zero3"])
def test_two_processes_equal_one(engine: str, alone_run: Path, tmp_path: Path) -> None:
    """Losses of every stage to a relative 1e-4, the same responses, a folder that loads whole."""
    if engine != "none":
        pytest.importorskip("deepspeed")
    done = run(tmp_path, *RUN, f"deepspeed={engine}", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bfpo, seed 0:") == 1, "one process speaks"
    expected, found = metrics(alone_run), metrics(tmp_path)
    assert found.keys() == expected.keys()
    losses = {key: value for key, value in expected.items() if key[0].endswith("/loss")}
    assert len([key for key in losses if key[0] == "train/loss"]) == 50
    for key, value in losses.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key
    assert losses["train/loss", 50] != pytest.approx(losses["train/loss", 1], rel=1e-2)
    assert responses(tmp_path) == responses(alone_run)
    assert any(responses(alone_run))
    assert_folders_alike(tmp_path, alone_run)


def assert_folders_alike(home: Path, other: Path) -> None:
    """Every weight is there, and about what it is in the other run."""
    import torch
    from transformers import AutoModelForCausalLM

    found, expected = (
        AutoModelForCausalLM.from_pretrained(next((h / "store" / "policy").glob("[!.]*"))).state_dict()
        for h in (home, other)
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=2e-3)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, *RUN, "train.batch=6", processes=4)
    assert done.returncode != 0
    assert "a batch of 6 cannot be shared out evenly over 4 processes" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["deepspeed=zero4"], "zero4"),
        (["deepspeed=zero2", "deepspeed.config.zero_optimization.stage=1"], "zero2, but .*stage=1"),
        (
            ["deepspeed=zero2", "+deepspeed.config.bf16.enabled=true"],
            "bf16 is decided by the training",
        ),
        (["deepspeed.name=zero2"], "config belongs to the ZeRO stages"),
    ],
)
def test_bad_settings_end_in_one_line(arguments: list[str], says: str, command: Any) -> None:
    import re

    assert re.search(says, command(*arguments).line)


def test_the_shares_of_a_group_are_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [Group(rank, 3).share(range(8)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(8))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert group() == Group(1, 2, 0)
    assert not group().main
    with alone():
        assert group() == Group()
    assert group().size == 2


@pytest.mark.slow
def test_how_a_step_is_cut_up_changes_no_loss() -> None:
    """8 pairs a step as 1 x 8, 8 x 1, and 4 x 1 in each of two processes; responses of 1 to 60 tokens."""
    script = str(Path(__file__).with_name("law_support.py"))

    def logged(microbatch: int, processes: int = 1) -> dict[str, list[float]]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), script, str(microbatch)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    whole, cut, shared = logged(8), logged(1), logged(1, processes=2)
    for loss, steps in whole.items():
        assert cut[loss] == pytest.approx(steps, rel=1e-4, abs=1e-5), loss
        assert shared[loss] == pytest.approx(steps, rel=1e-4, abs=1e-5), loss
        assert steps[-1] != pytest.approx(steps[0], rel=1e-3), loss


@pytest.mark.slow
def test_the_failure_of_any_process_is_the_runs(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("fail_support.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        [sys.executable, *launcher, "experiment=smoke"],
        env={**os.environ, "BFPO_EXP_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    (status,) = (tmp_path / "run").glob("*/status.json")
    assert json.loads(status.read_text()) == {
        "status": "failed",
        "reason": "process 1: RuntimeError: this GPU has fallen off the bus",
    }


def test_a_thread_that_is_late_does_not_abort_a_process_at_its_end() -> None:
    late = (
        "import sys, time, torch\n"
        "from bfpo_exp.distributed import ending, join\n"
        "with ending():\n"
        "    join(alone_too=True)\n"
        "    sys.setswitchinterval(1e6)  # another thread gets the interpreter when this one is done\n"
        "    torch.distributed.all_reduce(torch.ones(9), async_op=True)  # whose thread frees the tensor\n"
        "    end = time.monotonic() + 0.3\n"
        "    while time.monotonic() < end: pass\n"
        "    print('said'), sys.exit(3)\n"
    )
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "said\n"), done.stderr


def test_several_gpus_are_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    from bfpo_exp import app

    monkeypatch.setattr(logging.getLogger("bfpo_exp"), "propagate", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["bfpo-exp", "loss=dpo", "deepspeed=zero2"])
    with caplog.at_level(logging.INFO, logger="bfpo_exp"):
        app._tell_of_gpus()
        assert "torchrun --nproc-per-node 4 -m bfpo_exp loss=dpo deepspeed=zero2" in caplog.text
        caplog.clear()
        monkeypatch.setenv("WORLD_SIZE", "4")
        app._tell_of_gpus()
        assert not caplog.text
