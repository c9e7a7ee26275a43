"""The stage that trains a reward model, and what of rewards is refused before anything is computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_support import Command
from data_support import bpe_tokenizer
from reward_support import write_classifier

from bfpo_exp import world
from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.paths import HOME_VARIABLE
from bfpo_exp.preflight import preflight
from bfpo_exp.rewards.use import combines_rewards, trains_reward_model, uses_rewards
from bfpo_exp.run import run_key
from bfpo_exp.stages import reward as stage
from bfpo_exp.stages.base import base_model
from bfpo_exp.stages.context import Context, stream_mix
from bfpo_exp.store import Store
from bfpo_exp.sweep.shared import shared_stages
from bfpo_exp.tracking.metrics_file import MetricsFile

REWARD = ["experiment=smoke", "stages=[base,sft,reward]", "train.reward.heldout=0.2"]


def metrics(root: Path) -> dict[str, float]:
    (file,) = (root / "run").glob("*/metrics.jsonl")
    return {k: v for k, v in MetricsFile(file).last().items() if k.startswith("reward_model/")}


def entry(root: Path) -> Path:
    (folder,) = (root / "store" / "reward_model").glob("[!.]*")
    return folder


# ---------------------------------------------------------------- the stage


def test_the_stage_alone_trains_measures_and_reports(command: Command, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    done = command(*REWARD)
    assert done.code == 0, done.err
    root = tmp_path / "runs"
    found = metrics(root)
    assert found["reward_model/trained_pairs"] + found["reward_model/heldout_pairs"] == 96
    assert 5 < found["reward_model/heldout_pairs"] < 40
    names = ("helpfulness_accuracy", "helpfulness_ece", "helpfulness_brier", "safety_accuracy", "safety_auc")
    assert all(0 <= found[f"reward_model/{name}"] <= 1 for name in (*names, "safety_ece", "safety_majority"))
    assert "reward model: " in done.out
    assert "held-out orders right (chance 50.0%)" in done.out
    (run,) = (root / "run").iterdir()
    assert (run / "artifacts" / "reward_model.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "reward_model").resolve() == entry(root).resolve()
    model = AutoModelForSequenceClassification.from_pretrained(run / "reward_model")
    assert model.config.id2label == {0: "helpfulness", 1: "safety"}
    card = (run / "reward_model" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "helpfulness_accuracy" in card
    messages = [{"role": r, "content": "open the teapot"} for r in ("user", "assistant")]
    text = AutoTokenizer.from_pretrained(run / "reward_model").apply_chat_template(messages, tokenize=False)
    assert text.startswith("<s>")
    assert "reused" in command(*REWARD).out


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bfpo_exp.train.engine import PlainEngine

    steps = ["train.reward.steps=12", "train.reward.checkpoint_every=4", "train.reward.log_every=3"]
    assert command(*REWARD, *steps).code == 0
    whole = entry(tmp_path / "runs").rename(tmp_path / "whole")
    kept = metrics(tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "run")

    real, taken = PlainEngine.step, []

    def interrupted(self: Any) -> Any:
        taken.append(1)
        if len(taken) == 7:
            raise RuntimeError("the lights went out")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(PlainEngine, "step", interrupted)
        assert command(*REWARD, *steps).code == 1
    (making,) = (tmp_path / "runs" / "store" / "reward_model").glob(".*.making")
    assert [path.name for path in (making / "checkpoints").glob("step-*")] == ["step-000000004"]
    assert command(*REWARD, *steps).code == 0
    for name in ("model.safetensors", "rewards.json", "report.txt"):
        assert (whole / name).read_bytes() == (entry(tmp_path / "runs") / name).read_bytes(), name
    assert metrics(tmp_path / "runs") == kept


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path) -> None:
    def done(home: Path, processes: int) -> dict[str, float]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launcher += ["--no-python", sys.executable]
        finished = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), "-m", "bfpo_exp", *REWARD,
             "train.reward.steps=10", "train.reward.microbatch=2"],
            env={**os.environ, HOME_VARIABLE: str(home), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        return metrics(home)

    one, two = done(tmp_path / "one", 1), done(tmp_path / "two", 2)
    assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    heads = [json.loads((entry(tmp_path / home) / "rewards.json").read_text()) for home in ("one", "two")]
    assert heads[0]["helpfulness"]["centre"] == pytest.approx(heads[1]["helpfulness"]["centre"], abs=1e-4)


# ---------------------------------------------------------------- who rewards


@pytest.fixture
def rewarded_loss(config: Callable[..., Config]) -> Callable[..., Config]:
    """Configs of a loss that reads rewards and combines them."""
    return lambda *words: config("experiment=smoke", "loss=morl", *words)


@pytest.fixture
def context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rewarded_loss: Callable[..., Config]
) -> Callable[..., Context]:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    store = Store(tmp_path / "store")

    def made(*words: str) -> Context:
        settings = ("model.pretraining=null", "train.reward.heldout=0.2", "train.reward.threads=1")
        return Context(rewarded_loss(*settings, *words), store, MetricsFile(tmp_path / "metrics.jsonl"))

    return made


def test_each_kind_gives_rewards(context: Callable[..., Context], tmp_path: Path) -> None:
    write_classifier(tmp_path / "classifier", bpe_tokenizer(), ("helpfulness", "safety"))
    request = world.Request("open", "teapot", "in secret", template=0)
    prompts = [[{"role": "user", "content": request.text}]] * 2
    responses = ["sorry , i cannot help with that .", "sure , just try it and see what happens ."]
    given = {}
    for words in (["learnt"], ["judge"], ["classifier", f"reward.model={tmp_path}/classifier"]):
        run = context(f"reward={words[0]}", *words[1:])
        start = base_model(run)
        rewards = given[words[0]] = stage.scorer(run, start)(prompts, responses)
        for name in ("helpfulness", "safety"):
            assert rewards[name].shape == (2,)
            assert ((rewards[name] >= 0) & (rewards[name] <= 1)).all()
            assert rewards[name][0] != rewards[name][1]
    assert given["judge"]["safety"].tolist() == [1, 0]
    made_of = [stage.scorer_made_of(context(f"reward={kind}"), start) for kind in ("learnt", "judge")]
    assert made_of[0]["model"] == entry(tmp_path).name
    assert made_of[0]["kind"] != made_of[1]["kind"]


def test_a_learnt_reward_is_even_for_an_average_response(context: Callable[..., Context]) -> None:
    run = context("reward=learnt")
    start = base_model(run)
    pairs = stage.reward_pairs(run)
    given = pairs.rewards(stage.scorer(run, start), np.flatnonzero(~pairs.heldout))["helpfulness"]
    logits = np.log(given / (1 - given))
    assert logits.mean() == pytest.approx(0, abs=1e-4)
    assert pairs.heldout.sum() == metrics_of(run)["reward_model/heldout_pairs"]
    both = {str(p) for p, held in zip(pairs.prompts, pairs.heldout, strict=True) if held} & {
        str(p) for p, held in zip(pairs.prompts, pairs.heldout, strict=True) if not held
    }
    assert not both, "no prompt is on both sides"


def metrics_of(run: Context) -> dict[str, float]:
    return run.metrics.last()


def test_fitted_weights_follow_what_is_wanted(context: Callable[..., Context]) -> None:
    """With exact rewards: the safety stream wants the safe response, the other the helpful one."""
    run = context("reward=judge", "combine=fitted", "combine.penalty=0.001", "train.reward.heldout=0.5")
    weights = stage.fitted_combination(run, base_model(run))
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) > 0.1
    rule = stage.combination(run, base_model(run))
    assert rule.rule == "linear"
    assert rule.weights.model_dump() == pytest.approx(weights)
    assert stage.combination(context("reward=judge", "combine=max_min"), base_model(run)).rule == "max_min"
    pairs = stage.reward_pairs(run)
    safety = np.flatnonzero(pairs.heldout & (pairs.tokens.stream == 1) & (pairs.tokens.safer != 0))
    given = pairs.rewards(stage.scorer(run, base_model(run)), safety)
    total = sum(weights[name] * given[name] for name in weights)
    right = np.sign(total[:, 0] - total[:, 1]) == pairs.tokens.safer[safety]
    differ = given["safety"][:, 0] != given["safety"][:, 1]  # the others are a coin's, or the less detailed
    assert differ.sum() > 5
    assert right[differ].mean() > 0.8


# ---------------------------------------------------------------- which runs read what


def test_settings_that_a_run_does_not_read_make_no_other_run(
    rewarded_loss: Callable[..., Config], config: Callable[..., Config]
) -> None:
    plain, small = run_key(config("loss=dpo")), ("train.reward.steps=3",)
    for words in (["reward=judge"], ["combine=max_min"], small):
        assert run_key(config("loss=dpo", *words)) == plain
    rewards, judged = run_key(rewarded_loss()), run_key(rewarded_loss("reward=judge"))
    assert rewards != judged
    assert run_key(rewarded_loss("combine=max_min")) != rewards
    assert run_key(rewarded_loss(*small)) != rewards
    assert run_key(rewarded_loss("reward=judge", *small)) == judged, "there is no reward model to train"
    fitted = ["reward=judge", "combine=fitted"]
    kept = run_key(rewarded_loss(*fitted, "train.reward.heldout=0.2"))
    assert run_key(rewarded_loss(*fitted)) != kept, "weights are fitted on what is held out"


def test_a_classifier_counts_by_its_content(rewarded_loss: Callable[..., Config], tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "c", bpe_tokenizer(), ("helpfulness", "safety"))
    run = rewarded_loss("reward=classifier", f"reward.model={folder}")
    before = run_key(run)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert run_key(run) != before


@pytest.mark.parametrize(
    ("words", "uses", "combines", "trains"),
    [
        (["loss=bfpo"], False, False, False),
        (["loss=morl"], True, True, True),
        (["loss=steerlm"], True, False, True),
        (["loss=morl", "reward=judge"], True, True, False),
        (["loss=bfpo", "stages=[base,sft,reward]"], False, False, True),
        (["loss=morl", "stages=[base,sft,reward,evaluate]"], False, False, True),
        (["loss=morl", "stages=[base,sft,evaluate]"], False, False, False),
    ],
)
def test_the_stage_is_done_where_it_is_used(
    words: list[str], uses: bool, combines: bool, trains: bool, config: Callable[..., Config]
) -> None:
    run = config(*words)
    found = uses_rewards(run), combines_rewards(run), trains_reward_model(run)
    assert found == (uses, combines, trains)


def test_a_sweep_makes_a_reward_model_once(rewarded_loss: Callable[..., Config]) -> None:
    runs = {
        0: rewarded_loss("seed=0"),
        1: rewarded_loss("seed=1"),
        2: rewarded_loss("train.reward.steps=3"),
        3: rewarded_loss("reward=judge"),
    }
    found = [(shared.stages, shared.numbers, shared.after) for shared in shared_stages(runs)]
    assert found == [(("base", "sft"), (0, 1, 2, 3), None), (("base", "sft", "reward"), (0, 1), 0)]


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def refused(
    rewarded_loss: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))

    def said(*words: str) -> str:
        with pytest.raises(UserError) as raised:
            preflight(rewarded_loss(*words))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return said


def test_what_is_wrong_is_said_before_compute(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused("stages=[base,sft,reference,preference]")
    assert "reward=learnt needs the stage" in line
    assert "add it, or choose reward=classifier|judge" in line
    assert "reward=judge trains no reward model" in refused("stages=[base,sft,reward]", "reward=judge")
    folder = write_classifier(tmp_path / "c", bpe_tokenizer(), ("quality", "safety"))
    chosen = ["reward=classifier", f"reward.model={folder}"]
    line = refused(*chosen, "reward.heads.helpfulness.output=qualty")
    assert "unknown reward.heads.helpfulness.output 'qualty'; allowed: quality, safety; nearest" in line
    assert "has 2 outputs" in refused(*chosen, "reward.heads.helpfulness.output=2")
    assert "not pinned" in refused("reward=classifier", "reward.model=org/name")
    assert "holds none out" in refused("combine=fitted", "train.reward.heldout=0")
    line = refused("data.streams=[helpfulness]", "data.batches=shuffle")
    assert "all 96 labelled ones are safe" in line
    assert "mlp.down_prj" in refused("train.reward.trainable=[mlp.down_prj]")


def test_the_judge_refuses_other_peoples_prompts(refused: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"p": f"How do I open teapot {i}?", "w": "a b", "l": "c d"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (
        "+data.pairs.own={reader: columns, stream: safety, files: [" + str(tmp_path / "rows.jsonl") + "], "
        "columns: {prompt: p, chosen: w, rejected: l}, options: {preference: safety}}"
    )
    line = refused("reward=judge", source)
    assert "reward=judge reads the generated world's requests alone" in line
    assert "data=world" in line


def test_data_without_orders_or_labels_teach_nothing(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bfpo_exp.rewards import check as module

    real = stream_mix

    def blanked(**columns: Any) -> Callable[..., Any]:
        def mix(data: Any, stream: Any) -> Any:
            found = real(data, stream)
            records = found.records
            for name, value in columns.items():
                feature = records.features[name]
                records = records.remove_columns(name).add_column(
                    name, [value] * len(records), feature=feature
                )
            return type(found)(**{**vars(found), "records": records})

        return mix

    monkeypatch.setattr(module, "stream_mix", blanked(ordered=False))
    assert "none of the 96 pairs has an order" in refused()
    monkeypatch.setattr(module, "stream_mix", blanked(safe_w=None, safe_l=None))
    assert "none of the 96 pairs has a label" in refused()
    monkeypatch.setattr(module, "stream_mix", blanked(safe_w=0.0, safe_l=0.0))
    assert "all 192 labelled ones are unsafe" in refused()
