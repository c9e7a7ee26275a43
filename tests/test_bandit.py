"""The bandit of the paper's Section 3.4: its finding, the closed form, and what one batched run promises."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bfpo_exp.bandit.figure import learning_curves
from bfpo_exp.bandit.optimum import optimum
from bfpo_exp.bandit.problem import pairs, ranking_of, ranking_text, wanted_ranking
from bfpo_exp.bandit.results import BanditResult
from bfpo_exp.bandit.settings import BanditSettings, Point
from bfpo_exp.bandit.train import pair_weights, run_bandit
from bfpo_exp.errors import UserError

WANTED, BY_HELPFULNESS = "y1>y3>y4>y2", "y1>y2>y3>y4"

# g of (more helpful, less helpful) at b1 = 3, alpha = 0.5, by their safety labels: the paper's table.
BFPO_CELLS = {(1, 0): 1.0, (1, 1): 0.5, (0, 0): -0.5, (0, 1): -1.0}


@pytest.fixture(scope="module")
def paper() -> BanditResult:
    """The paper's own run: tau 0.1, 0.5 and 1; 1800 steps of batches of 32; five repeats."""
    return run_bandit(BanditSettings())


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# -- the problem


def test_the_wanted_ranking_is_safe_by_helpfulness_then_unsafe_against_it() -> None:
    assert wanted_ranking([1, 0, 1, 0], [1, 2, 3, 4]) == [1, 3, 4, 2]
    assert wanted_ranking([1, 1, 1], [3, 1, 2]) == [3, 1, 2]
    assert wanted_ranking([0, 0, 0], [3, 1, 2]) == [2, 1, 3]
    assert wanted_ranking([0, 1, 0, 1, 0], [5, 4, 3, 2, 1]) == [4, 2, 1, 3, 5]


def test_all_pairs_once_in_helpfulness_order() -> None:
    assert pairs([3, 1, 2]) == [(3, 1), (3, 2), (1, 2)]
    assert len(pairs(range(1, 8))) == 7 * 6 / 2


def test_ties_are_shown_and_are_no_ranking() -> None:
    assert ranking_of([-1.0, -2.0, -1.0 - 1e-8]) == "y1=y3>y2"
    all_safe = run_bandit(
        BanditSettings(methods=["ipo"], taus=[1], safe=[1, 1], helpfulness=[1, 2], steps=50)
    )
    assert all_safe.steps[0] == 0
    assert not all_safe.recovered[0].any()
    assert all_safe.recovered[-1].all()


# -- the paper's finding


def test_only_bfpo_recovers_the_wanted_ranking(paper: BanditResult) -> None:
    found = {(row["method"], row["tau"], row["repeat"]): row for row in rows(paper.csv())}
    assert len(found) == 3 * 3 * 5
    for (method, _, _), row in found.items():
        assert row["ranking"] == (WANTED if method == "bfpo" else BY_HELPFULNESS)
        assert row["recovered"] == ("1" if method == "bfpo" else "0")


def test_dpo_drifts_towards_a_deterministic_policy() -> None:
    settings = BanditSettings(methods=["dpo"], taus=[1.0], batch=None, repeats=1, steps=6000)
    p1 = dict(
        zip((result := run_bandit(settings)).steps, result.log_pi[:, 0, 0, 0].exp().tolist(), strict=True)
    )
    assert 0.9 < p1[1800] < p1[3600] < p1[6000]
    assert p1[6000] > 0.99


def test_the_papers_own_setting_ends_near_the_closed_form(paper: BanditResult) -> None:
    """Batches of 32 leave noise: the total variation is below 0.02 in 200 repeats a setting."""
    squared = [row for row, point in enumerate(paper.settings.points) if point.method != "dpo"]
    assert paper.tv_to_optimum[-1, squared].max() < 0.03
    assert paper.tv_to_optimum[0, squared].min() > 0.1
    assert paper.tv_to_optimum[:, [row for row in range(9) if row not in squared]].isnan().all()


# -- the closed form


def by_hand(method: str, tau: float, safe: list[int], helpfulness: list[int]) -> list[float]:
    """softmax of (1/n) sum over the other actions of +-g / tau, g from the paper's table."""
    n = len(safe)
    utility = [0.0] * n
    for place, better in enumerate(helpfulness):
        for worse in helpfulness[place + 1 :]:
            g = 0.5 if method == "ipo" else BFPO_CELLS[safe[better - 1], safe[worse - 1]]
            utility[better - 1] += g / (n * tau)
            utility[worse - 1] -= g / (n * tau)
    total = sum(map(math.exp, utility))
    return [math.exp(u) / total for u in utility]


@pytest.mark.parametrize(
    ("safe", "helpfulness"),
    [([1, 0, 1, 0], [1, 2, 3, 4]), ([0, 1], [1, 2]), ([0, 0, 1, 1, 0, 1], [4, 2, 6, 1, 3, 5])],
)
def test_trained_policies_equal_the_closed_form(safe: list[int], helpfulness: list[int]) -> None:
    """With the exact gradient (batch=None); at tau = 0.1, 1800 steps are still 5e-4 away, 3000 are not."""
    settings = BanditSettings(
        methods=["bfpo", "ipo"], safe=safe, helpfulness=helpfulness, batch=None, repeats=1, steps=3000
    )
    result = run_bandit(settings)
    for row, point in enumerate(settings.points):
        expected = torch.tensor(by_hand(point.method, point.tau, safe, helpfulness), dtype=torch.float64)
        torch.testing.assert_close(result.log_pi[-1, row, 0].exp(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(result.optimum[row].exp(), expected, atol=1e-12, rtol=0)
    assert result.tv_to_optimum[-1].max() < 1e-6


def test_a_known_tie_of_the_closed_form() -> None:
    """n (u(y2) - u(y4)) = 1 - 4 alpha for the paper's labels: alpha = 1/4 ties them."""
    log_pi = optimum(BanditSettings(), Point("bfpo", 1.0, 0.25, 3.0))
    assert log_pi is not None
    assert ranking_of(log_pi.tolist()) == "y1>y3>y2=y4"


@pytest.mark.parametrize("n", range(2, 7))
def test_alpha_within_half_over_n_less_one_of_a_half_suffices_and_no_wider_range_does(n: int) -> None:
    """For every label pattern and b1: |alpha - 1/2| < 1 / (2 (n - 1)); just outside, one pattern fails."""
    reach, first, last = 1 / (2 * (n - 1)), 0, 1

    def failing(alpha: float, b1: float) -> list[tuple[int, ...]]:
        found = []
        for safe in itertools.product((0, 1), repeat=n):
            settings = BanditSettings(safe=safe, helpfulness=range(1, n + 1))
            log_pi = optimum(settings, Point("bfpo", 1.0, alpha, b1))
            assert log_pi is not None
            if ranking_of(log_pi.tolist()) != ranking_text(settings.wanted):
                found.append(safe)
        return found

    for b1 in (1.05, 3.0, 100.0):
        for alpha in (0.5 - reach + 1e-4, 0.5, 0.5 + reach - 1e-4):
            assert failing(alpha, b1) == []
        assert failing(0.5 - reach - 1e-4, b1) == [(first, *(last,) * (n - 2), first)]
        assert failing(0.5 + reach + 1e-4, b1) == [(last, *(first,) * (n - 2), last)]


# -- one batched computation


def test_adding_settings_or_repeats_changes_no_numbers() -> None:
    alone = run_bandit(BanditSettings(methods=["bfpo", "dpo"], taus=[0.5], steps=200, repeats=2))
    grid = BanditSettings(
        methods=["ipo", "dpo", "bfpo"],
        taus=[0.1, 0.5, 2],
        alphas=[0.1, 0.5],
        b1s=[2, 3, 9],
        steps=200,
        repeats=3,
    )
    together = run_bandit(grid)
    for row, point in enumerate(alone.settings.points):
        assert torch.equal(alone.log_pi[:, row], together.log_pi[:, grid.points.index(point), :2])


def plain_loss(point: Point, h: Tensor, s_w: Tensor, s_l: Tensor) -> Tensor:
    if point.method == "dpo":
        return torch.log1p(torch.exp(-point.tau * h))
    if point.alpha is None or point.b1 is None:
        return (h - 1 / (2 * point.tau)) ** 2
    return (h - ((point.b1 * s_w - s_l) / (point.b1 - 1) - point.alpha) / point.tau) ** 2


def test_equals_one_plain_loop_per_policy() -> None:
    """One optimiser a policy, on pairs gathered one by one, with the losses written anew."""
    problem: dict[str, Any] = {"safe": [0, 1, 1], "helpfulness": [3, 1, 2]}
    grid: dict[str, Any] = {"taus": [0.2, 1.0], "alphas": [0.3], "b1s": [2, 4]}
    settings = BanditSettings(**problem, **grid, steps=120, batch=8, repeats=2, lr=0.05, seed=7)
    result = run_bandit(settings)
    better, worse = torch.tensor([2, 2, 0]), torch.tensor([0, 1, 1])
    safe = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    for repeat in range(2):
        draws = torch.from_numpy(np.random.default_rng([7, repeat]).integers(3, size=(120, 8)))
        for row, point in enumerate(settings.points):
            theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
            adam = torch.optim.Adam([theta], lr=0.05)
            for drawn in draws:
                w, l = better[drawn], worse[drawn]  # noqa: E741
                adam.zero_grad()
                plain_loss(point, theta[w] - theta[l], safe[w], safe[l]).mean().backward()
                adam.step()
            expected = theta.detach().log_softmax(-1)
            torch.testing.assert_close(result.log_pi[-1, row, repeat], expected, atol=1e-9, rtol=0)


def test_batches_are_drawn_evenly_and_differ_between_repeats() -> None:
    weights = pair_weights(BanditSettings(repeats=2))
    assert weights.shape == (1800, 2, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1800, 2, dtype=torch.float64))
    # A pair's share of 1800 * 32 draws has the standard deviation sqrt(5/36 / 57600) = 0.00155.
    assert (weights.mean(0) - 1 / 6).abs().max() < 5 * 0.00155
    assert not torch.equal(weights[:, 0], weights[:, 1])
    assert (pair_weights(BanditSettings(batch=None)) == 1 / 6).all()


def test_sixty_settings_take_seconds() -> None:
    settings = BanditSettings(taus=[0.05, 0.1, 0.2, 0.5, 1], alphas=[0, 0.25, 0.5, 0.75, 1], b1s=[2, 3])
    assert len(settings.points) == 60
    start = time.process_time()
    run_bandit(settings)
    assert time.process_time() - start < 10


# -- what is reported


def test_csv_has_one_row_per_setting_and_repeat(paper: BanditResult) -> None:
    text = paper.csv()
    assert text.splitlines()[0] == "method,tau,alpha,b1,repeat,ranking,recovered,p1,p2,p3,p4"
    for row in rows(text):
        assert (row["alpha"], row["b1"]) == (("0.5", "3") if row["method"] == "bfpo" else ("", ""))
        p = [float(row[f"p{action}"]) for action in (1, 2, 3, 4)]
        assert sum(p) == pytest.approx(1)
        assert row["ranking"] == ">".join(f"y{i + 1}" for i in sorted(range(4), key=lambda i: -p[i]))
    assert [row["repeat"] for row in rows(text)][:6] == ["1", "2", "3", "4", "5", "1"]


def test_the_report_has_one_aligned_line_a_setting(paper: BanditResult) -> None:
    lines = paper.lines()
    assert len(lines) == 9
    assert lines[0] == f"bfpo  tau 0.1  alpha 0.5  {WANTED}  wanted {WANTED}  recovered 5 of 5"
    assert lines[5] == f"dpo   tau 1    alpha -    {BY_HELPFULNESS}  wanted {WANTED}  recovered 0 of 5"


def test_repeats_that_differ_are_counted() -> None:
    """At alpha = 1/4 y2 and y4 tie in the closed form, so that noise decides."""
    result = run_bandit(BanditSettings(methods=["bfpo"], taus=[1], alphas=[0.25], repeats=20, steps=600))
    (line,) = result.lines()
    recovered = int(result.recovered[-1].sum())
    assert 0 < recovered < 20
    assert re.search(
        rf"\({max(recovered, 20 - recovered)} of 20\)  wanted .* recovered {recovered} of 20", line
    )


def test_metrics_are_curves_under_names_that_mlflow_takes(paper: BanditResult) -> None:
    metrics = list(paper.metrics())
    steps = [step for step, _ in metrics]
    assert steps[0] == 0
    assert steps[-1] == 1800
    assert 50 <= len(steps) <= 150
    last = metrics[-1][1]
    assert last["bandit/bfpo/tau_0.1/recovered"] == 100
    assert last["bandit/ipo/tau_1/recovered"] == 0
    mean = sum(float(row["p3"]) for row in rows(paper.csv())[:5]) / 5
    assert last["bandit/bfpo/tau_0.1/p3"] == pytest.approx(mean)
    assert "bandit/dpo/tau_1/tv_to_optimum" not in last
    assert {name.rpartition("/")[2] for name in last} == {
        "recovered",
        "p1",
        "p2",
        "p3",
        "p4",
        "tv_to_optimum",
    }
    assert metrics[0][1]["bandit/ipo/tau_0.5/p2"] == pytest.approx(0.25)
    assert not any(math.isnan(value) for _, values in metrics for value in values.values())


def test_metric_names_tell_the_settings_of_a_grid_apart() -> None:
    settings = BanditSettings(
        methods=["bfpo", "dpo"], taus=[0.1, 1e20], alphas=[-0.5, 1e-7], b1s=[2, 3], steps=1, repeats=1
    )
    (_, values), *_ = run_bandit(settings).metrics()
    names = {name.rpartition("/")[0] for name in values}
    assert len(names) == 2 * 2 * 2 + 2
    assert {"bandit/bfpo/tau_0.1_alpha_-0.5_b1_2", "bandit/bfpo/tau_1e20_alpha_1e-07_b1_3"} < names
    assert {"bandit/dpo/tau_0.1", "bandit/dpo/tau_1e20"} < names
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", name) for name in values)


def test_the_figure_is_the_same_bytes_for_the_same_run(tmp_path: Path) -> None:
    result = run_bandit(BanditSettings(methods=["bfpo", "dpo"], taus=[1], alphas=[0.5, 0.4], steps=20))
    first, again = (learning_curves(result, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == again
    assert len(first) > 1000


# -- bad input


def test_settings_are_checked_without_torch() -> None:
    code = "import sys; import bfpo_exp.bandit.settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"helpfulness": [1, 2, 3]}, "helpfulness is [1, 2, 3]; allowed: each of the actions 1 to 4 once"),
        ({"helpfulness": [1, 2, 2, 4]}, "each of the actions 1 to 4 once"),
        ({"helpfulness": [0, 1, 2, 3]}, "each of the actions 1 to 4 once"),
        ({"safe": [1, 0, 1]}, "each of the actions 1 to 3 once"),
        ({"safe": [1, 0, 2, 0]}, "safe holds 2; allowed: 0 (unsafe) or 1 (safe)"),
        ({"safe": [1, 0, 0.5, 0]}, "safe holds 0.5; allowed: 0 (unsafe) or 1 (safe)"),
        ({"safe": [1], "helpfulness": [1]}, "safe has 1 labels; allowed: one label an action, at least 2"),
        ({"safe": [], "helpfulness": []}, "at least 2"),
        ({"methods": []}, "methods is empty"),
        ({"methods": ["bfpx"]}, "unknown bandit method 'bfpx'; allowed: bfpo, dpo, ipo; nearest: 'bfpo'"),
        ({"taus": []}, "taus is empty"),
        ({"taus": [0.1, 0]}, "taus holds 0.0; allowed: > 0"),
        ({"taus": [math.nan]}, "taus holds nan; allowed: > 0"),
        ({"taus": [0.1, 0.1]}, "taus is [0.1, 0.1]; allowed: each value once"),
        ({"alphas": [math.inf]}, "alphas holds inf; allowed: finite"),
        ({"b1s": [1]}, "b1s holds 1.0; allowed: > 1"),
        ({"steps": 0}, "steps is 0; allowed: a whole number >= 1"),
        ({"batch": 0}, "batch is 0; allowed: a whole number >= 1"),
        ({"repeats": 2.5}, "repeats is 2.5; allowed: a whole number >= 1"),
        ({"seed": -1}, "seed is -1; allowed: a whole number >= 0"),
        ({"lr": 0}, "lr is 0; allowed: > 0"),
    ],
)
def test_bad_input_is_told_in_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        BanditSettings(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
