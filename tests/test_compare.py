"""Comparison: which runs are one setting, what their numbers are, and how they are shown."""

from __future__ import annotations

import io
import itertools
import math
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from bfpo_exp import ui
from bfpo_exp.compare import cli
from bfpo_exp.compare.collect import RunRow
from bfpo_exp.compare.curves import training_curves
from bfpo_exp.compare.pareto import pareto_front, plot_pareto
from bfpo_exp.compare.published import published
from bfpo_exp.compare.render import grid, grid_to_csv, to_csv, to_latex, to_markdown, to_rich, to_text
from bfpo_exp.compare.report import sweep_report
from bfpo_exp.compare.settings import MISSING, grouped, identifying
from bfpo_exp.compare.table import DEFAULT_METRICS, Cell, compare
from bfpo_exp.config.schema import Tracking
from bfpo_exp.errors import UserError
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.tracking.parent import open_parent
from bfpo_exp.tracking.recorder import Recorder, failed
from bfpo_exp.tracking.store import prepare

_started = itertools.count()


def row(
    params: Mapping[str, object],
    metrics: Mapping[str, float] | None = None,
    status: str = "FINISHED",
    **tags: str,
) -> RunRow:
    number = next(_started)
    texts = {name: str(value) for name, value in params.items()}
    return RunRow(f"id{number}", f"run{number}", status, number, texts, dict(metrics or {}), tags)


def params_of(*grids: Mapping[str, object]) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in params.items()} for params in grids]


def test_exact_rewards_are_marked_as_an_upper_bound() -> None:
    scores = {"eval/helpfulness": 60.0}
    exact = {"rewards": "judge (exact: an upper bound)"}
    rows = [
        row({"method": "bfpo"}, scores),
        row({"method": "morl"}, scores, **exact),
        row({"method": "steerlm"}, scores, rewards="learnt"),
    ]
    (note,) = compare(rows, "t").footnotes
    assert note == "trained on the exact rewards of the generated world's judge, an upper bound: morl"


# ---------------------------------------------------------------- grouping


def test_methods_by_seeds_are_told_apart_by_method_alone() -> None:
    methods = {
        "dpo": ("dpo", 0.1, "shuffle"),
        "ipo": ("ipo", 0.2, "shuffle"),
        "bfpo": ("bfpo", 0.2, "balanced"),
    }
    runs = params_of(
        *(
            {
                "method": method,
                "loss.name": loss,
                "loss.beta": beta,
                "data.batches": batches,
                "seed": seed,
                "eval.seed": seed,  # equals the seed
                "data.seed": 100 + seed,  # follows it
                "train.lr": 3e-4,
            }
            for method, (loss, beta, batches) in methods.items()
            for seed in range(3)
        )
    )
    assert identifying(runs) == ["method"]
    assert grouped(runs, ["method"]) == {("dpo",): [0, 1, 2], ("ipo",): [3, 4, 5], ("bfpo",): [6, 7, 8]}


def test_alpha_by_beta_by_seeds_stand_in_numerical_order() -> None:
    runs = params_of(
        *(
            {"method": "null", "loss.name": "bfpo", "loss.alpha": a, "loss.beta": b, "seed": seed}
            for a, b, seed in itertools.product((1, 0, -0.5), (10, 2), (0, 1))
        )
    )
    assert identifying(runs) == ["loss.alpha", "loss.beta"]
    settings = list(grouped(runs, ["loss.alpha", "loss.beta"]))
    assert settings == [("-0.5", "2"), ("-0.5", "10"), ("0", "2"), ("0", "10"), ("1", "2"), ("1", "10")]


def test_a_param_beyond_the_method_is_a_column_of_its_own() -> None:
    runs = params_of(
        *(
            {"method": m, "loss.name": m, "loss.beta": b, "seed": 0}
            for m in ("dpo", "bfpo")
            for b in (0.1, 0.2)
        )
    )
    assert identifying(runs) == ["method", "loss.beta"]


def test_losses_hide_what_only_one_of_them_has() -> None:
    runs = params_of({"loss.name": "dpo", "loss.beta": 0.1}, {"loss.name": "bfpo", "loss.alpha": 0.5})
    assert identifying(runs) == ["loss.name"]


def test_a_param_that_follows_another_is_hidden() -> None:
    runs = params_of(
        *(
            {"train.batch": b, "train.steps": 960 // b, "loss.alpha": a}
            for b, a in itertools.product((8, 16), (0, 1))
        )
    )
    assert identifying(runs) == ["loss.alpha", "train.batch"]


def test_a_random_search_with_a_seed_each_keeps_its_settings_apart() -> None:
    """Every param is then a function of the seed, and of every other param, by accident."""
    runs = params_of(
        {"seed": 5, "loss.alpha": 0.1, "loss.beta": 0.3},
        {"seed": 6, "loss.alpha": 0.7, "loss.beta": 0.2},
        {"seed": 7, "loss.alpha": 0.4, "loss.beta": 0.9},
    )
    assert identifying(runs) == ["loss.alpha", "loss.beta"]


def test_seeds_alone_are_one_setting_named_by_its_loss() -> None:
    runs = params_of(*({"method": "null", "loss.name": "bfpo", "seed": s, "eval.seed": s} for s in range(3)))
    assert grouped(runs, identifying(runs)) == {("bfpo",): [0, 1, 2]}


# ---------------------------------------------------------------- numbers


@pytest.fixture
def rows() -> list[RunRow]:
    """Two methods, three seeds; worked by hand in `test_mean_and_spread`."""
    scores = {"dpo": ((70.0, 40.0), (72.0, 44.0), (74.0, 48.0)), "bfpo": ((60.0, 90.0), (60.0, 92.0))}
    done = [
        row({"method": m, "seed": s}, {"eval/helpfulness": h, "eval/savg": g, "eval/over_refusal": h / 10})
        for m, pairs in scores.items()
        for s, (h, g) in enumerate(pairs)
    ]
    return [*done, row({"method": "bfpo", "seed": 2}, {"eval/savg": 1.0}, "FAILED", failure="loss is NaN")]


def test_mean_and_spread(rows: list[RunRow]) -> None:
    dpo, bfpo = compare(rows, "t").rows
    # 70, 72, 74: mean 72, deviations -2, 0, 2, variance 8 / (3 - 1) = 4
    assert dpo.cells["eval/helpfulness"] == Cell(72.0, 2.0, 3)
    # 90, 92: mean 91, variance 2 / (2 - 1); the failed run's score is not counted
    assert bfpo.cells["eval/savg"] == Cell(91.0, math.sqrt(2), 2)
    assert bfpo.cells["eval/gen"] is None


def test_nan_is_a_missing_score_and_one_run_has_no_spread() -> None:
    assert Cell.of([math.nan]) is None
    assert Cell.of([math.nan, 3.0]) == Cell(3.0, None, 1)


def test_markdown(rows: list[RunRow]) -> None:
    text = to_markdown(grid(compare(rows, "Sweep x", ("eval/helpfulness", "eval/gen", "eval/over_refusal"))))
    assert "| method | n | helpfulness ↑ | gen ↑ | over-refusal ↓ |" in text
    assert f"| dpo | 3 | **72.0 ± 2.0** | {MISSING} | 7.2 ± 0.2 |" in text
    assert f"| bfpo | 2 | 60.0 ± 0.0 | {MISSING} | **6.0 ± 0.0** |" in text
    assert "1 of 6 runs failed: loss is NaN (1x)." in text
    assert "sample standard deviation over seeds, n = 2 to 3" in text


def test_latex(rows: list[RunRow]) -> None:
    text = to_latex(grid(compare(rows, "50% & more_x", ("eval/helpfulness",))))
    assert r"dpo & 3 & \textbf{72.0 $\pm$ 2.0} \\" in text
    assert r"\caption{50\% \& more\_x. In percent;" in text


def test_csv_has_plain_numbers(rows: list[RunRow]) -> None:
    lines = to_csv(compare(rows, "t", ("eval/helpfulness", "eval/gen"))).splitlines()
    assert lines[0].split(",")[:4] == [
        "method",
        "eval/helpfulness mean",
        "eval/helpfulness sd",
        "eval/helpfulness n",
    ]
    assert lines[1] == "dpo,72.0,2.0,3,,,0"


def test_the_terminal_table_fits_eighty_columns() -> None:
    scores = dict.fromkeys(DEFAULT_METRICS, 71.234)
    runs = [row({"method": m, "seed": s}, scores) for m in ("dpo_balanced", "bfpo") for s in (0, 1)]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(to_rich(grid(compare([*runs, row({"method": "bfpo", "seed": 2}, scores)], "t"))))
    text = captured.get()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert any(line.startswith("dpo_balanced") and line.count("71.2±0.0") == 6 for line in lines)


def test_sorting_knows_the_better_direction(rows: list[RunRow]) -> None:
    def order(metric: str) -> list[str]:
        return [r.values[0] for r in compare(rows, "t", sort=metric).rows]

    assert order("eval/helpfulness") == ["dpo", "bfpo"]
    assert order("eval/over_refusal") == ["bfpo", "dpo"]
    with pytest.raises(UserError, match="nearest: 'eval/savg'"):
        compare(rows, "t", sort="eval/savgg")


def test_a_tie_as_shown_marks_both() -> None:
    runs = [row({"method": m}, {"eval/gen": v}) for m, v in (("a", 50.01), ("b", 50.04), ("c", 49.0))]
    assert compare(runs, "t").best("eval/gen") == {0, 1}


# ---------------------------------------------------------------- published rows

PUBLISHED = {
    "table2": {
        "DPO-H (Zephyr)": "10.99 59.05 62.94 60.99",
        "DPO-S": "4.34 56.42 96.91 76.66",
        "DPO": "14.71 58.35 39.71 49.03",
        "IPO": "13.15 58.41 89.76 74.09",
        "MORL": "10.83 58.54 64.88 61.71",
        "BFPO": "13.33 59.09 95.24 77.16",
    },
    "table3": {
        "Zephyr-7b-beta": "10.99 59.05 62.94 60.99",
        "+ DPO": "13.07 59.28 74.39 66.83",
        "+ IPO": "13.07 59.32 72.82 66.07",
        "+ MORL": "13.07 58.57 65.02 61.80",
        "+ BFPO": "14.41 59.02 88.79 73.90",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_are_those_of_the_paper(name: str) -> None:
    (table,) = published(name)
    assert {r[0]: " ".join(r[1:]) for r in table.rows} == PUBLISHED[name]
    assert not table.best
    for *_, disc, gen, savg in table.rows:
        assert float(savg) == pytest.approx((float(disc) + float(gen)) / 2, abs=0.0101)


def test_published_cost_and_ablation() -> None:
    cost, ablation = published("table4")
    assert [(r[0], r[1], *r[3:]) for r in cost.rows] == [
        ("Beaver", "300K", "3", "1.00", "71.80"),
        ("Llama2", "1M", "6", "7.60", "73.80"),
        ("BFPO", "30K", "1", "13.33", "77.16"),
    ]
    assert [r[1:] for r in ablation.rows] == [
        ("13.33", "59.09", "0.95", "0.77"),
        ("12.76", "0.62", "0.93", "0.77"),
        ("15.59", "0.62", "0.89", "0.75"),
    ]
    assert "swapped names" in " ".join(ablation.notes)
    assert grid_to_csv(cost).splitlines()[1] == "Beaver,300K,✓,3,1.00,71.80"


# ---------------------------------------------------------------- figures


def test_the_front_keeps_ties_and_drops_what_is_beaten() -> None:
    assert pareto_front([(1, 1), (1, 1), (0, 2), (0, 1), (1, 0)]) == [2, 0, 1]
    assert pareto_front([]) == []


def test_the_plot_is_the_same_bytes_each_time(rows: list[RunRow], tmp_path: Path) -> None:
    comparison = compare(rows, "t")
    files = [tmp_path / "0.svg", tmp_path / "1.svg"]
    svg = [plot_pareto(comparison, [file], y="eval/savg")[0].read_text() for file in files]
    assert svg[0] == svg[1]
    assert plot_pareto(compare(rows, "t", ("eval/gen",)), [tmp_path / "none.svg"]) == []
    assert not (tmp_path / "none.svg").exists()


def test_texts_in_a_crowd_do_not_overlap() -> None:
    from bfpo_exp.compare.figures import figure
    from bfpo_exp.compare.labels import Label, place_labels

    crowd = [Label(f"setting {i}", 50 + i % 3 * 0.4, 60 + i // 3 * 0.4, 0.1, 0.1, "black") for i in range(9)]
    with figure(6, 4) as drawn:
        axes = drawn.add_subplot()
        axes.set(xlim=(40, 60), ylim=(50, 70))
        place_labels(axes, crowd)
        drawn.canvas.draw()
        boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(crowd)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_training_curves(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert training_curves(file, tmp_path / "none.png") is None
    for step in range(5):
        file.append(
            step, {"train/loss": 1.0 - step / 10, "train/reward_safe": step, "train/reward_unsafe": -step}
        )
    path = training_curves(file, tmp_path / "training.png", "bfpo, seed 0")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- a sweep in MLflow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A runs root with one sweep of two methods and two seeds, one of whose runs failed."""
    root = tmp_path_factory.mktemp("root")
    uri = prepare(Tracking(uri="sqlite", experiment="e"), root)
    parent = open_parent(uri, "e", "my_sweep", root / "sweep", {}, {})
    for method, seed in itertools.product(("dpo", "bfpo"), (0, 1)):
        folder = root / f"{method}{seed}"
        folder.mkdir()
        config = {"method": method, "seed": seed, "loss": {"name": method}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        recorder = Recorder(uri, "e", folder, folder.name, parent)
        if (method, seed) == ("bfpo", 1):
            recorder.finish("FAILED", failed("out of memory"))
            continue
        base = 70.0 if method == "dpo" else 60.0
        scores = {"eval/helpfulness": base + 2 * seed, "eval/gen": 150.0 - base, "eval/savg": math.inf}
        MetricsFile(folder / "metrics.jsonl").append(0, scores)
        recorder.finish("FINISHED")
    return root, uri, parent


def test_the_report_of_a_sweep(sweep: tuple[Path, str, str], tmp_path: Path) -> None:
    _, uri, parent = sweep
    table, files = sweep_report(uri, "e", parent, tmp_path)
    assert not isinstance(table, str)
    text = to_text(table)
    assert {f.name for f in files} == {"table.md", "table.csv", "table.tex", "pareto.png", "pareto.svg"}
    assert all(f.stat().st_size for f in files)
    assert "71.0±1.4" in text  # 70 and 72: mean 71, sd sqrt(2)
    assert "Seeds that vary: seed." in text
    assert "1 of 4 runs failed: out of memory (1x)." in text


def test_a_sweep_without_results_is_told_in_a_line(sweep: tuple[Path, str, str], tmp_path: Path) -> None:
    _, uri, _ = sweep
    empty = open_parent(uri, "e", "empty", tmp_path / "empty", {}, {})
    assert sweep_report(uri, "e", empty, tmp_path) == (
        "Sweep empty: no run has finished, so there is nothing to compare (it has no runs).",
        [],
    )
    text, files = sweep_report(uri, "e", "0" * 32, tmp_path)
    assert str(text).startswith("No comparison yet: ")
    assert files == []


def test_the_command(
    sweep: tuple[Path, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, _, parent = sweep
    monkeypatch.setenv("BFPO_EXP_HOME", str(root))

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    code, out, _ = call("my_sweep", "--metrics", "helpfulness,savg", "--published", "table2")
    assert code == 0
    assert "Sweep my_sweep" in out
    assert out.index("71.0±1.4") < out.index("Published (BFPO, arXiv 2408.15313, Table 2; Mistral-7B)")

    code, out, _ = call(parent, "--format", "csv", "--metrics", "savg")
    assert out.splitlines()[1].startswith("dpo,inf,")  # what MLflow stores as 1.8e308

    code, _, err = call("my_sweep", "--output", str(tmp_path / "out"))
    assert code == 0
    assert str(tmp_path / "out" / "pareto.svg") in err

    for arguments, message in (
        (["my_swep"], "unknown sweep 'my_swep'; allowed: empty, my_sweep; nearest: 'my_sweep'"),
        (["my_sweep", "--metrics", "helpfullness"], "nearest: 'eval/helpfulness'"),
        (["--published", "table9"], "unknown published table 'table9'"),
        (["--tracking", "redis://x"], "unknown tracking.uri 'redis://x'"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_nothing_recorded_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BFPO_EXP_HOME", str(tmp_path))
    for main in (cli.main, ui.main):
        assert main([]) == 2
        err = capsys.readouterr().err
        assert "nothing is recorded yet" in err
        assert err.count("\n") == 1


# ---------------------------------------------------------------- the dashboard


def test_a_taken_port_is_one_line(
    sweep: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BFPO_EXP_HOME", str(sweep[0]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert ui.main(["--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in err
    assert err.count("\n") == 1


def test_the_server_is_bound_to_loopback_with_one_worker(tmp_path: Path) -> None:
    command = ui.server_command("sqlite:////x/mlflow.db", tmp_path, ui.LOOPBACK, 5000)
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--host"] == "127.0.0.1"
    assert options["--workers"] == "1"
    assert options["--backend-store-uri"] == "sqlite:////x/mlflow.db"
