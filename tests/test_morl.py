"""``loss=morl`` through the command: what it leaves behind, what it refuses, and on several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from app_support import Command
from test_distributed import metrics, run

TINY = ["experiment=smoke", "loss=morl", "loss.max_new_tokens=8", "train.log_every=1"]


def the_run(home: Path) -> Path:
    (folder,) = (home / "runs" / "run").iterdir()
    return folder


@pytest.mark.parametrize("reward", ["judge", "learnt"])
def test_a_run_from_end_to_end(command: Command, tmp_path: Path, reward: str) -> None:
    done = command(*TINY, f"reward={reward}")
    assert done.code == 0, done.err
    folder = the_run(tmp_path)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for entry in entries for name, value in entry["metrics"].items()}
    for name in ("reward", "reward_helpfulness", "reward_safety", "kl", "loss", "clip_fraction"):
        assert f"train/{name}" in last
    assert {"eval/helpfulness", "eval/gen", "perf/pairs_per_second", "perf/tokens_per_second"} <= set(last)
    samples = [json.loads(line) for line in (folder / "artifacts" / "samples.jsonl").read_text().splitlines()]
    # A rollout: two batches of eight prompts with four samples, passed over twice; six steps begin two.
    assert len(samples) == 2 * 2 * 8 * 4
    assert {sample["rollout"] for sample in samples} == {0, 1}
    for sample in samples:
        assert 0 <= sample["helpfulness"] <= 1
        assert 0 <= sample["safety"] <= 1
        assert sample["reward"] == pytest.approx(
            0.5 * sample["helpfulness"] + 0.5 * sample["safety"], abs=1e-6
        )


def test_its_config_is_refused_where_it_cannot_work(command: Command) -> None:
    for words, says in {
        "loss.samples=1": "advantages=leave_one_out compares the samples of a prompt, and samples=1",
        "loss.kl=k2": "loss.kl='k2' is not allowed; allowed: 'k1', 'k3' or 'exact'",
        "loss.clip=1": "loss.clip=1 is not allowed",
        "loss.beta=0 loss.kl_target=1": "kl_target steers beta by factors",
        "loss.max_new_tokens=10000": "data.format.max_prompt_length + loss.max_new_tokens = 10048 tokens",
        "loss.sample=4": "'samples'",
        "train.compile=true": "train.compile=true is for losses on pairs",
        "deepspeed=zero3": "keeps in parts; use deepspeed=none|zero1|zero2",
        "combine.weights.helpfulness=-1": "combine.weights.helpfulness=-1 is not allowed",
        "combine.weights={helpfulness:0,safety:0}": "all weights are 0",
        "+combine.weights.harmlessness=1": "harmlessness",
        "combine=linar": "linar",
        "train.batch=7": "train.batch=7 is odd",
        "stages=[base,sft,preference]": "reward",
    }.items():
        assert says in command(*TINY, *words.split(" ")).line, words


TOGETHER = [*TINY, "reward=judge", "train.trainable=all", "train.microbatch=2"]
TOGETHER += ["stages=[base,sft,preference]"]


@pytest.fixture(scope="module")
def alone_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("one")
    done = run(home, *TOGETHER)
    assert done.returncode == 0, done.stderr
    return home


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_two_processes_equal_one(alone_run: Path, tmp_path: Path, engine: str) -> None:
    """The same samples, and the same updates to a relative 1e-4."""
    if engine != "none":
        pytest.importorskip("deepspeed")
    done = run(tmp_path, *TOGETHER, f"deepspeed={engine}", processes=2)
    assert done.returncode == 0, done.stderr
    expected, found = metrics(alone_run), metrics(tmp_path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key[0].startswith("train/"):
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    files = [next(home.glob("store/policy/*/samples.jsonl")) for home in (alone_run, tmp_path)]
    texts = [[json.loads(line)["response"] for line in file.read_text().splitlines()] for file in files]
    assert texts[0] == texts[1]
