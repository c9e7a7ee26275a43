"""The real command, end to end: what it leaves behind, and what it says to a bad input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from app_support import Command

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
COUNTED = (
    "tie",
    "prompt_mismatch",
    "empty_response",
    "identical_responses",
    "contradiction",
    "duplicate",
    "kept",
)
SMOKE = "experiment=smoke"


@pytest.mark.slow
def test_a_sweep_lands_in_mlflow_and_is_reused(command: Command, tmp_path: Path) -> None:
    arguments = ("-m", SMOKE, "method=dpo,bfpo", "seed=0,1", "hydra.launcher.n_jobs=2")
    done = command(*arguments)
    assert done.code == 0, done.err
    assert "4 runs, of which 0 reused and 0 failed" in done.out
    for row in ("dpo", "bfpo"):
        assert re.search(rf"^{row} +[\d.]+±[\d.]+", done.out, re.M), done.out

    root = tmp_path / "runs"
    assert len(list((root / "store" / "base").glob("[!.]*"))) == 1, "a sweep trains its base model once"
    assert len(list((root / "store" / "sft").glob("[!.]*"))) == 1
    assert len(list((root / "store" / "reference").glob("[!.]*"))) == 2, "one a stream, whatever the loss"
    assert len(list((root / "store" / "policy").glob("[!.]*"))) == 4

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("bfpo-exp")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["bfpo.kind"] == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} >= {
        "table.md",
        "pareto.png",
        "pareto.svg",
    }
    for child in children:
        metrics, params, tags = child.data.metrics, child.data.params, child.data.tags
        for name in ("helpfulness", "disc", "gen", "savg", "over_refusal", "task/helpful", "malformed"):
            assert 0 <= metrics[f"eval/{name}"] <= 100
        assert metrics["eval/savg"] == pytest.approx((metrics["eval/disc"] + metrics["eval/gen"]) / 2)
        for name in ("loss", "margin", "accuracy", "kl", "reward_safe", "cell_safe_safe", "cell_safe_unsafe"):
            assert f"train/{name}" in metrics
        for name in ("pairs_per_second", "tokens_per_second", "peak_memory_gb"):
            assert metrics[f"perf/{name}"] > 0
        assert params["loss.name"] == params["method"]
        assert tags["pair_order"] == params["loss.order"]
        assert {"config_hash", "data_fingerprint", "host"} <= set(tags)
        steps = [m.step for m in client.get_metric_history(child.info.run_id, "train/loss")]
        assert steps == [1, 2, 4, 6]
        artifacts = {f.path for f in client.list_artifacts(child.info.run_id)}
        assert artifacts == {
            *("config.yaml", "dataset_card.md", "generations.json", "model_card.md", "training.png")
        }

    again = command(*arguments)
    assert "4 runs, of which 4 reused and 0 failed" in again.out
    assert table_of(again.out) == table_of(done.out)
    assert len(client.search_runs([experiment.experiment_id])) == 10
    fresh = command("-m", SMOKE, "method=dpo", "seed=0,2")
    assert "2 runs, of which 1 reused and 0 failed" in fresh.out


def table_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if "±" in line]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_bit_for_bit(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metrics(home: str, seed: int) -> dict[str, float]:
        monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path / home))
        assert command(SMOKE, f"seed={seed}").code == 0
        (file,) = [
            f for f in (tmp_path / home / "run").glob("*/metrics.jsonl")
            if f"seed: {seed}\n" in (f.parent / "config.yaml").read_text().split("threads")[0]
        ]  # fmt: skip
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        return {
            f"{name} at {entry['step']}": value
            for entry in entries
            for name, value in entry["metrics"].items()
            if not name.startswith("perf/")
        }

    first = metrics("a", 0)
    assert metrics("b", 0) == first
    other = metrics("a", 1)
    assert other.keys() == first.keys()
    assert other["train/loss at 6"] != first["train/loss at 6"]


@pytest.mark.slow
def test_a_failing_run_takes_no_other_down(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command("-m", SMOKE, "train.lr=1e-3,1e38", "train.clip=null", "hydra.launcher.n_jobs=1")
    assert done.code == 1
    assert "2 runs, of which 0 reused and 1 failed" in done.out
    assert re.search(r"log-probs are not finite at step \d+ for training pairs .*: lower train.lr", done.out)
    (failed,) = (tmp_path / "runs" / "run").glob("*/artifacts/traceback.txt")
    assert "UserError" in failed.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "sft"])
def test_a_stage_that_runs_away_says_which_rate_to_lower(command: Command, stage: str) -> None:
    done = command(SMOKE, f"train.{stage}.lr=1e30", f"train.{stage}.clip=null")
    assert done.code == 1
    assert re.search(rf"the loss is nan at step \d+: lower train.{stage}.lr \(1e\+30\)", done.out)


BAD = {
    "unknown loss": (["loss=bfpx"], "unknown loss 'bfpx'; allowed: bfpo, bso, cdpo, .*; nearest: 'bfpo'"),
    "misspelt key": (["loss.betta=1"], "unknown key in loss 'betta'; .* nearest: 'beta'"),
    "misspelt group": (["losss=dpo"], "unknown key 'losss'; .* nearest: 'loss'"),
    "one value of a sweep": (["-m", "loss.beta=0.1,-1,0.2"], r"beta=-1 .* greater than 0 .*job loss"),
    "one name of a sweep": (["-m", "loss=dpo,bfpx"], "unknown loss 'bfpx'"),
    "b1": (["loss.b1=1"], r"loss\.b1=1 is not allowed: input should be greater than 1"),
    "type": (["train.batch=many"], r"train\.batch='many' is not allowed: .*integer"),
    "no file": (
        ["data=real_sample", "data.pairs.pku_saferlhf.files=[/nowhere/rows.jsonl]"],
        "pku_saferlhf.*no such file: /nowhere/rows.jsonl",
    ),
    "no model": (["model=hf", "model.path=/nowhere/model"], "/nowhere/model' is no model: there is no such"),
    "no weights": (["model=hf", "model.path=/tmp"], "is no model: it holds no config.json"),
    "no path": (["model=hf"], r"model: .*set model\.path="),
    "no server": (["tracking.uri=http://127.0.0.1:9"], "no MLflow server answers at http://127.0.0.1:9"),
    "scheme": (["tracking.uri=ftp://somewhere"], "ftp://somewhere"),
    "no streams": (["data.streams=[]"], "data mix is empty: streams="),
    "no rows": (["data.pairs.world_safety.size=0"], "data mix is empty: no source with rows .*'safety'"),
    "one stream": (["data.streams=[safety]"], "use batches=shuffle"),
    "odd batch": (["train.batch=7", "train.microbatch=7"], "train.batch=7 is odd"),
    "no layer": (["train.trainable=[mlp.down_prj]"], "'mlp.down_prj'.*nearest: 'mlp.down_proj'"),
    "no judge": (["eval.tasks.helpful.kind=world_helpfull"], "'world_helpfull'.*nearest: 'world_helpful'"),
    "no held-out pairs": (["eval=pairs"], "data.heldout=0 holds none out"),
    "no room": (["data.format.max_prompt_length=96"], "max_prompt_length=96 leaves no room"),
    "Hydra's flags": (["-m", "--cfg", "job"], "Only one of"),
    "grammar": (["loss.beta=[1"], r"no viable alternative at input '\[1'"),
    "order": (["loss.order=safety"], r"loss\.order=safety is not allowed: loss bfpo .* by helpfulness"),
    "bandit without settings": (["stages=[bandit]"], "bandit has no settings; use experiment=bandit"),
    "bandit's labels": (["experiment=bandit", "bandit.safe=[1,0,2,0]"], "safe holds 2; allowed: 0 .* or 1"),
    "bandit's methods": (["experiment=bandit", "bandit.methods=[bfpp]"], "unknown bandit method 'bfpp'"),
    "bandit's ranking": (["experiment=bandit", "bandit.helpfulness=[1,2,3]"], "each of the actions 1 to 4"),
    "positions": (["data.format.max_length=200"], "max_length = 200 tokens, but .* has 128 positions"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD.keys())
def test_a_bad_input_ends_in_one_line(
    command: Command, tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = command(*arguments)
    assert re.search(says, done.line), done.line
    assert not (tmp_path / "runs" / "run").exists(), "nothing was started"
    assert not (tmp_path / "runs" / "store").exists(), "nothing was computed"


def test_a_runs_root_that_cannot_be_written(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for arguments in ([SMOKE], ["-m", SMOKE]):
        monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path / "file" / "runs"))
        assert "cannot write to the runs root" in command(*arguments).line


def test_rows_of_a_wrong_schema(command: Command, tmp_path: Path) -> None:
    good = {"prompt": "p", "response_0": "a", "response_1": "b", "is_response_0_safe": True,
            "is_response_1_safe": False, "better_response_id": 0, "safer_response_id": 0}  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    files = f"data.pairs.pku_saferlhf.files=[{rows}]"
    rows.write_text("\n".join(json.dumps(row) for row in (good, good | {"is_response_0_safe": "perhaps"})))
    assert re.search(
        r"rows.jsonl, row 1, column 'is_response_0_safe': expected .* found str",
        command("data=real_sample", files).line,
    )
    del good["response_1"]
    rows.write_text(json.dumps(good))
    assert re.search(r"rows.jsonl.*column 'response_1' is missing", command("data=real_sample", files).line)


def test_a_loss_without_its_labels(command: Command, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    pairs = [
        {"prompt": f"p{i}", "response_0": "a", "response_1": "b", "is_response_0_safe": True,
         "is_response_1_safe": False, "better_response_id": None, "safer_response_id": 0}
        for i in range(3)
    ]  # fmt: skip
    rows.write_text("\n".join(map(json.dumps, pairs)))
    files = [f"data.pairs.{s}.files=[{rows}]" for s in ("pku_saferlhf", "ultrafeedback")]
    only_safety = [
        "data=real_sample",
        "data.streams=[safety]",
        "data.batches=shuffle",
        "data.heldout=0",
        *files,
    ]
    only_safety += [
        "data.ranker.kind=none",
        "data.sft.pku_saferlhf.files=[" + str(rows) + "]",
        "stages=[preference]",
    ]
    assert re.search(
        r"loss bfpo trains on helpfulness order, but 3 of 3 pairs of source 'pku_saferlhf' have none; "
        r"supply it with data.ranker.kind=",
        command(*only_safety).line,
    )


def test_a_tokenizer_without_an_end(command: Command, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path / "model"
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=4, **shape)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    assert "has no end-of-sequence token" in command("model=hf", f"model.path={folder}").line


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real rows is not there")
def test_real_rows_from_file_to_mlflow(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BFPO_EXP_DATA", str(DATA))
    quick = [
        "train.steps=4",
        "train.sft.steps=4",
        "eval.tasks.more_helpful.size=20",
        "eval.tasks.safer.size=20",
    ]
    sizes = [f"data.{k}.{s}.size=60" for k in ("pairs", "sft") for s in ("ultrafeedback", "pku_saferlhf")]
    done = command("-m", "experiment=real_sample", *quick, *sizes)
    assert done.code == 0, done.out + done.err
    files = list((tmp_path / "runs" / "run").glob("*/metrics.jsonl"))
    assert len(files) == 3
    for file in files:
        metrics = {
            k: v for line in file.read_text().splitlines() for k, v in json.loads(line)["metrics"].items()
        }
        assert metrics["data/ultrafeedback/rows"] == 1000
        assert metrics["data/ultrafeedback/tie"] == 111
        assert metrics["data/pku_saferlhf/rows"] == 3272
        for source in ("ultrafeedback", "pku_saferlhf"):
            counted = sum(metrics[f"data/{source}/{reason}"] for reason in COUNTED)
            assert counted == metrics[f"data/{source}/rows"], "every row is accounted for"
        assert all(value == value and abs(value) < 1e30 for value in metrics.values())
        assert 0 <= metrics["eval/task/safer"] <= 100
    stopped = command("-m", "experiment=real_sample", "data.ranker.kind=none", *quick, *sizes)
    assert "supply it with data.ranker.kind=column|model|longer" in stopped.line


def test_the_bandit_is_a_run_like_any_other(command: Command, tmp_path: Path) -> None:
    grid = ("bandit.taus=[0.5,1]", "bandit.steps=900", "bandit.repeats=2")
    done = command("-m", "experiment=bandit", *grid)
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines() if "recovered" in line]
    assert [line[:5] for line in lines[:2]] == [["bfpo", "tau", t, "alpha", "0.5"] for t in ("0.5", "1")]
    assert [line[0] for line in lines] == ["bfpo", "bfpo", "dpo", "dpo", "ipo", "ipo"]
    assert all(line[-4:] == ["recovered", "2", "of", "2"] for line in lines[:2])
    assert all(line[5:8] == ["y1>y2>y3>y4", "wanted", "y1>y3>y4>y2"] for line in lines[2:])
    assert "its runs were not scored" in done.out

    (folder,) = (tmp_path / "runs" / "run").iterdir()
    rows = list(csv.DictReader((folder / "bandit.csv").open()))
    assert len(rows) == 3 * 2 * 2
    assert ",".join(rows[0]) == "method,tau,alpha,b1,repeat,ranking,recovered,p1,p2,p3,p4"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "bfpo-exp"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`bfpo.kind` = 'run'")
    assert run.data.metrics["bandit/bfpo/tau_0.5/recovered"] == 100
    p1 = [float(row["p1"]) for row in rows if (row["method"], row["tau"]) == ("ipo", "1")]
    assert run.data.metrics["bandit/ipo/tau_1/p1"] == pytest.approx(sum(p1) / 2)
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"bandit.csv", "bandit.png"}

    again = command("-m", "experiment=bandit", *grid)
    assert "1 run, of which 1 reused" in again.out
    assert [line.split() for line in again.out.splitlines() if "recovered" in line] == lines
