"""Recording: nothing is lost and nothing is doubled, whatever is killed or unreachable."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bfpo_exp.config.schema import Tracking
from bfpo_exp.errors import UserError
from bfpo_exp.tracking.client import connect, experiment_id
from bfpo_exp.tracking.environment import environment_tags
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.tracking.params import MAX_PARAM, flatten
from bfpo_exp.tracking.parent import finish_parent, open_parent
from bfpo_exp.tracking.recorder import METRICS_PER_CALL, Recorder, failed, publish_copy
from bfpo_exp.tracking.store import existing, prepare, resolve
from bfpo_exp.tracking.tables import write_table

EXPERIMENT = "tests"
CONFIG = {"seed": 0, "method": None, "loss": {"name": "bfpo", "alpha": 0.5}, "stages": ["sft"]}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests here: to make one takes seconds."""
    return prepare(Tracking(uri="sqlite", experiment=EXPERIMENT), tmp_path_factory.mktemp("root"))


@pytest.fixture
def closed_uri() -> str:
    """A loopback address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's folder with config, tags and a table, and no metrics yet."""
    folder = tmp_path / "run"
    (folder / "artifacts").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "tags.json").write_text(json.dumps({"host": "here"}))
    write_table(folder / "artifacts" / "generations.json", {"prompt": ["a", "b"], "score": [1.0, math.nan]})
    return folder


def run_id(recorder: Recorder) -> str:
    assert recorder.run_id is not None, recorder.failure
    return recorder.run_id


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in connect(uri).get_metric_history(run_id, name)]


# ---------------------------------------------------------------- the file


def test_metrics_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append(1, {"train/loss": 0.5})
    file.append(2, {"train/loss": 0.4})
    file.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "ti')

    assert [e.step for e in MetricsFile(path).read()] == [1, 2]
    assert path.read_bytes().endswith(b'"ti'), "reading must not change a file that another may write"
    again = MetricsFile(path)
    again.append(3, {"train/loss": 0.3})
    assert [(e.step, e.metrics) for e in again.read()] == [
        (1, {"train/loss": 0.5}),
        (2, {"train/loss": 0.4}),
        (3, {"train/loss": 0.3}),
    ]


def test_a_restarted_run_appends_only_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(1, {"a": 1.0})
    restarted = MetricsFile(path)
    restarted.append(1, {"a": 1.0})
    restarted.append(1, {"a": 1.0, "b": 2.0})
    restarted.append(2, {"a": 3.0})
    assert [(e.step, e.metrics) for e in restarted.read()] == [
        (1, {"a": 1.0}),
        (1, {"b": 2.0}),
        (2, {"a": 3.0}),
    ]
    assert restarted.last() == {"a": 3.0, "b": 2.0}


def test_nan_and_infinity_are_read_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"nan": math.nan, "inf": math.inf})
    last = file.last()
    assert math.isnan(last["nan"])
    assert last["inf"] == math.inf


def test_no_file_has_no_metrics(tmp_path: Path) -> None:
    assert MetricsFile(tmp_path / "none.jsonl").last() == {}


# ---------------------------------------------------------------- the store


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("sqlite:///here.db", Path("/runs")) == f"sqlite:///{tmp_path}/here.db"
    for wrong in ("postgres://x", "sqlite://", "sqlite:///", "mlruns", ""):
        with pytest.raises(UserError, match=r"unknown tracking\.uri"):
            resolve(wrong, tmp_path)


def test_a_store_that_is_ready_is_found_without_importing_mlflow(uri: str) -> None:
    root = Path(uri.removeprefix("sqlite:///")).parent
    code = (
        "import sys; from pathlib import Path; from bfpo_exp.config.schema import Tracking\n"
        "from bfpo_exp.tracking.store import prepare\n"
        f"print(prepare(Tracking(uri='sqlite', experiment={EXPERIMENT!r}), Path({str(root)!r})))\n"
        "assert 'mlflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == uri
    assert done.stderr == ""


def test_artifacts_lie_under_the_root(uri: str) -> None:
    root = Path(uri.removeprefix("sqlite:///")).parent
    client = connect(uri)
    experiment = client.get_experiment(experiment_id(client, EXPERIMENT))
    assert experiment.artifact_location == (root / "mlartifacts").as_uri()


def test_errors_name_the_store_and_a_way_out(tmp_path: Path, closed_uri: str) -> None:
    with pytest.raises(UserError, match=f"no MLflow server answers at {closed_uri}.*tracking.uri=sqlite"):
        prepare(Tracking(uri=closed_uri, experiment="x"), tmp_path)
    with pytest.raises(UserError, match="nothing is recorded yet"):
        existing("sqlite", tmp_path)


def _prepare_and_record(root: str, number: int) -> None:
    uri = prepare(Tracking(uri="sqlite", experiment="race"), Path(root))
    client = connect(uri)
    client.create_run(experiment_id(client, "race"), run_name=f"run {number}")


@pytest.mark.slow
def test_eight_processes_race_for_a_fresh_store(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_prepare_and_record, args=(str(tmp_path), i)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    client = connect(existing("sqlite", tmp_path))
    runs = client.search_runs([experiment_id(client, "race")])
    assert {run.info.run_name for run in runs} == {f"run {i}" for i in range(8)}


# ---------------------------------------------------------------- publishing


def test_a_run_is_published_whole(uri: str, run_dir: Path, tmp_path: Path) -> None:
    parent = open_parent(
        uri, EXPERIMENT, "s", tmp_path / "sweep", {"host": "here"}, {"grid": {"seed": "0,1"}}
    )
    file = MetricsFile(run_dir / "metrics.jsonl")
    steps = METRICS_PER_CALL // 2 + 10  # of two metrics each: more than one call
    for step in range(steps):
        file.append(step, {"train/loss": 1.0 / (step + 1), "eval/task/hhh (v2)": math.nan})
    recorder = Recorder(uri, EXPERIMENT, run_dir, "bfpo-s0", parent)
    recorder.open()
    recorder.finish("FINISHED", {"extra": "yes"})
    assert recorder.failure is None

    run = connect(uri).get_run(run_id(recorder))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "bfpo-s0"
    assert run.data.params == {
        "seed": "0",
        "method": "null",
        "loss.name": "bfpo",
        "loss.alpha": "0.5",
        "stages": '["sft"]',
    }
    wanted = {
        "mlflow.parentRunId": parent,
        "bfpo.kind": "run",
        "bfpo.label": "bfpo",
        "host": "here",
        "extra": "yes",
    }
    assert wanted.items() <= run.data.tags.items()
    assert history(uri, run_id(recorder), "train/loss") == [(s, 1.0 / (s + 1)) for s in range(steps)]
    assert len(history(uri, run_id(recorder), "eval/task/hhh _v2_")) == steps


def test_mlflow_reads_our_tables(uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(uri, EXPERIMENT, run_dir, "table")
    recorder.finish("FINISHED")
    experiment = experiment_id(connect(uri), EXPERIMENT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # `load_table` searches through the global store
    table = connect(uri).load_table(experiment, "generations.json", [run_id(recorder)])
    assert list(table.columns) == ["prompt", "score"]
    assert list(table["prompt"]) == ["a", "b"]
    assert table["score"][0] == 1.0
    assert math.isnan(table["score"][1])


def test_a_table_of_uneven_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_table(tmp_path / "t.json", {"a": [1, 2], "b": [1]})


CHILD = """
import sys, time
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.tracking.recorder import Recorder
uri, experiment, run_dir = sys.argv[1:]
file = MetricsFile(run_dir + "/metrics.jsonl")
recorder = Recorder(uri, experiment, run_dir, "killed")
recorder.open()
for step in range(10_000):
    file.append(step, {"train/loss": step / 8})
    recorder.sync()
"""


def test_a_killed_run_is_continued_without_loss_or_double(uri: str, run_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, uri, EXPERIMENT, str(run_dir)])
    file = MetricsFile(run_dir / "metrics.jsonl")
    deadline = time.monotonic() + 120
    while sum(1 for _ in file.read()) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.wait()
    first = json.loads((run_dir / "mlflow.json").read_text())

    restarted = MetricsFile(run_dir / "metrics.jsonl")
    for step in range(40):  # from a checkpoint before the kill: the same numbers once more
        restarted.append(step, {"train/loss": step / 8})
    recorder = Recorder(uri, EXPERIMENT, run_dir, "killed")
    recorder.finish("FINISHED")
    assert recorder.run_id == first["run_id"]
    stop = max(40, len(list(restarted.read())))
    assert history(uri, run_id(recorder), "train/loss") == [(s, s / 8) for s in range(stop)]


def test_a_kill_between_send_and_note_doubles_nothing(uri: str, run_dir: Path) -> None:
    """The note of what was sent, or even of the run's id, is set back to before the send."""
    file = MetricsFile(run_dir / "metrics.jsonl")
    file.append(1, {"a": 1.0, "b": math.nan})
    recorder = Recorder(uri, EXPERIMENT, run_dir, "twice")
    recorder.sync()
    note = run_dir / "mlflow.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"offset": 0, "run_id": None}))
    file.append(2, {"a": 2.0, "b": math.nan})
    again = Recorder(uri, EXPERIMENT, run_dir, "twice")
    again.sync()
    assert again.run_id == recorder.run_id
    assert history(uri, run_id(again), "a") == [(1, 1.0), (2, 2.0)]
    assert len(history(uri, run_id(again), "b")) == 2


def test_a_dead_server_costs_seconds_and_no_metric(
    uri: str, closed_uri: str, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MetricsFile(run_dir / "metrics.jsonl")
    started = time.monotonic()
    recorder = Recorder(closed_uri, EXPERIMENT, run_dir, "offline")
    recorder.open()
    for step in range(50):
        file.append(step, {"a": float(step)})
        recorder.sync()
    recorder.finish("FINISHED")
    assert time.monotonic() - started < 30
    assert recorder.failure
    assert recorder.run_id is None
    assert len([r for r in caplog.records if "cannot record" in r.message]) == 1

    recorder = Recorder(uri, EXPERIMENT, run_dir, "offline")  # another store, later
    recorder.sync()
    assert recorder.failure is None
    assert history(uri, run_id(recorder), "a") == [(s, float(s)) for s in range(50)]


def test_a_store_that_fails_for_a_while_gets_the_rest_later(
    uri: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(Recorder, "RETRY_AFTER", 0.0)
    file = MetricsFile(run_dir / "metrics.jsonl")
    recorder = Recorder(uri, EXPERIMENT, run_dir, "locked")
    recorder.open()
    with monkeypatch.context() as broken:

        def locked(*_: object, **__: object) -> None:
            raise MlflowException("database is locked")

        broken.setattr(MlflowClient, "log_batch", locked)
        file.append(1, {"a": 1.0})
        recorder.sync()
        assert recorder.failure == "MlflowException: database is locked"
    time.sleep(0.2)
    file.append(2, {"a": 2.0})
    recorder.sync()
    assert recorder.failure is None
    assert history(uri, run_id(recorder), "a") == [(1, 1.0), (2, 2.0)]


def test_a_failed_run_says_why_until_it_succeeds(uri: str, run_dir: Path) -> None:
    recorder = Recorder(uri, EXPERIMENT, run_dir, "fails")
    recorder.finish("FAILED", failed("loss is NaN\n  at step 12"))
    run = connect(uri).get_run(run_id(recorder))
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "loss is NaN at step 12")
    again = Recorder(uri, EXPERIMENT, run_dir, "fails")
    again.finish("FINISHED")
    run = connect(uri).get_run(run_id(again))
    assert again.run_id == recorder.run_id
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags


def test_a_reused_run_is_a_child_of_each_sweep_once(uri: str, run_dir: Path, tmp_path: Path) -> None:
    first, second = (open_parent(uri, EXPERIMENT, n, tmp_path / n, {}, {}) for n in ("first", "second"))
    MetricsFile(run_dir / "metrics.jsonl").append(1, {"a": 1.0})
    recorder = Recorder(uri, EXPERIMENT, run_dir, "shared", first)
    recorder.finish("FINISHED")

    copy = publish_copy(uri, EXPERIMENT, run_dir, "shared", second)
    assert copy is not None
    assert copy != recorder.run_id
    run = connect(uri).get_run(copy)
    assert run.data.tags["reused_from"] == recorder.run_id
    assert run.data.tags["mlflow.parentRunId"] == second
    assert run.info.status == "FINISHED"
    assert history(uri, copy, "a") == [(1, 1.0)]
    assert [f.path for f in connect(uri).list_artifacts(copy)] == ["generations.json"]

    assert publish_copy(uri, EXPERIMENT, run_dir, "shared", second) == copy
    assert publish_copy(uri, EXPERIMENT, run_dir, "shared", first) == recorder.run_id


def test_a_run_that_was_deleted_in_mlflow_is_published_anew(uri: str, run_dir: Path) -> None:
    MetricsFile(run_dir / "metrics.jsonl").append(1, {"a": 1.0})
    recorder = Recorder(uri, EXPERIMENT, run_dir, "deleted")
    recorder.finish("FINISHED")
    connect(uri).delete_run(run_id(recorder))
    anew = publish_copy(uri, EXPERIMENT, run_dir, "deleted", None)
    assert anew is not None
    assert anew != recorder.run_id
    assert history(uri, anew, "a") == [(1, 1.0)]


def test_the_parent_is_opened_once_per_folder(uri: str, tmp_path: Path) -> None:
    first = open_parent(uri, EXPERIMENT, "sweep", tmp_path, {"host": "here"}, {"overrides": ["seed=0,1"]})
    report = tmp_path / "table.md"
    report.write_text("| a |")
    finish_parent(uri, first, [report])
    run = connect(uri).get_run(first)
    assert (run.info.status, run.data.tags["bfpo.kind"]) == ("FINISHED", "sweep")
    assert [f.path for f in connect(uri).list_artifacts(first)] == ["table.md"]
    assert open_parent(uri, EXPERIMENT, "sweep", tmp_path, {}, {"overrides": ["seed=0,1"]}) == first


# ---------------------------------------------------------------- params and tags


def test_long_values_are_cut_with_a_note() -> None:
    value = flatten({"options": ["x" * MAX_PARAM]})["options"]
    assert len(value) == MAX_PARAM
    assert value.endswith("config.yaml)")


def test_environment_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert not any(name.startswith("slurm.") for name in environment_tags())
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    tags = environment_tags()
    assert tags["slurm.job_id"] == "17"
    assert tags["host"] == socket.gethostname()
    assert tags["version.mlflow"]
