"""The label of several factors: `bfpo_label` for one, its guarantees over all cells for up to five."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bfpo_exp.errors import UserError
from bfpo_exp.losses import bfpo_label
from bfpo_exp.losses.factors import factors_label, factors_score, lexicographic_weights
from bfpo_exp.theory import (
    Constants,
    Problem,
    bilinear_reward,
    independent_ranking_problem,
    rl_optimum,
    supervised_optimum,
    total_variation,
    uncorrelated_problem,
)

F64 = torch.float64
laws = settings(max_examples=40, deadline=None)
each_count = pytest.mark.parametrize("m", range(1, 6))
b1s, alphas = st.floats(1.05, 20), st.floats(0.01, 0.99)


def vectors(m: int) -> Tensor:
    """All 2^m factor vectors in lexicographic order, worst first: (2^m, m), float64."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=m)), dtype=F64)


def cells(m: int) -> tuple[Tensor, Tensor]:
    """All pairs of factor vectors, (4^m, m) each."""
    every = vectors(m)
    return every.repeat_interleave(2**m, 0), every.repeat(2**m, 1)


def label(factors_w: Tensor, factors_l: Tensor, b1: float, alpha: float) -> Tensor:
    return factors_label(
        factors_w=factors_w,
        factors_l=factors_l,
        weights=lexicographic_weights(factors_w.shape[-1]),
        b1=b1,
        alpha=alpha,
    )


def simplex(draw: st.DrawFn, m: int) -> tuple[float, ...]:
    raw = draw(st.lists(st.floats(0.01, 1), min_size=m, max_size=m))
    return tuple(x / sum(raw) for x in raw)


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[int, tuple[float, ...], float, float, int]:
    """m, any weights, b1, alpha, a seed."""
    m = draw(st.integers(1, 5))
    return m, simplex(draw, m), draw(b1s), draw(alphas), draw(st.integers(0, 10**6))


# --- one factor ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize(("b1", "alpha"), [(3.0, 0.5), (1.7, 0.3), (11.0, 0.0)])
@pytest.mark.filterwarnings("ignore:alpha")
def test_one_factor_is_bfpo_label_bit_for_bit(dtype: torch.dtype, b1: float, alpha: float) -> None:
    g = torch.Generator().manual_seed(0)
    w, l = (torch.rand(50, generator=g).round(decimals=2) for _ in range(2))  # noqa: E741
    w, l = (x > 0.5 if dtype == torch.bool else x.to(dtype) for x in (w, l))  # noqa: E741
    expected = bfpo_label(safe_w=w, safe_l=l, b1=b1, alpha=alpha)
    got = factors_label(factors_w=w[:, None], factors_l=l[:, None], weights=(1.0,), b1=b1, alpha=alpha)
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype


def test_equal_factors_are_one_factor() -> None:
    s = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64)
    t = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=F64)
    expected = bfpo_label(safe_w=s, safe_l=t, b1=3.0, alpha=0.5)
    got = label(s[:, None].expand(-1, 4), t[:, None].expand(-1, 4), 3.0, 0.5)
    torch.testing.assert_close(got, expected)


# --- the score ----------------------------------------------------------------------------------


@each_count
def test_score_orders_factor_vectors_lexicographically_in_equal_steps(m: int) -> None:
    weights = lexicographic_weights(m)
    assert sum(weights) == pytest.approx(1)
    assert all(weights[k] > sum(weights[k + 1 :]) for k in range(m))
    expected = torch.linspace(0, 1, 2**m, dtype=F64)
    torch.testing.assert_close(factors_score(vectors(m), weights), expected)


@laws
@given(settings_of())
def test_score_never_leaves_the_unit_interval(case: tuple) -> None:
    m, weights, *_ = case
    score = factors_score(vectors(m).float(), weights)
    assert score.min() >= 0
    assert score.max() <= 1


@pytest.mark.parametrize(
    ("weights", "shown"), [((0.5, 0.4), "sum to 1"), ((1.2, -0.2), ">= 0"), ((float("nan"), 0.5), "sum to 1")]
)
def test_weights_that_are_no_shares_are_refused(weights: tuple[float, ...], shown: str) -> None:
    with pytest.raises(UserError, match=shown):
        factors_score(torch.ones(1, 2), weights)


def test_bad_factors_are_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(4, 3\).*2 weights"):
        factors_score(torch.ones(4, 3), (0.5, 0.5))
    with pytest.raises(UserError, match=r"factor 2 is outside.* rows 1"):
        factors_score(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), (0.5, 0.5))
    with pytest.raises(UserError, match="0 factors"):
        lexicographic_weights(0)


# --- guarantees over all cells ------------------------------------------------------------------


@laws
@given(settings_of())
def test_each_factor_moves_the_label_by_its_weight(case: tuple) -> None:
    """Up by (1 + b3) c_k in the more helpful response, down by b3 c_k in the less helpful one."""
    m, weights, b1, alpha, _ = case
    b3 = 1 / (b1 - 1)
    w, l = cells(m)  # noqa: E741
    for k in range(m):
        on, off = (torch.arange(m) == k).to(F64), (torch.arange(m) != k).to(F64)

        def g(factors_w: Tensor, factors_l: Tensor) -> Tensor:
            return factors_label(
                factors_w=factors_w, factors_l=factors_l, weights=weights, b1=b1, alpha=alpha
            )

        up, down = g(w * off + on, l) - g(w * off, l), g(w, l * off + on) - g(w, l * off)
        torch.testing.assert_close(up, torch.full_like(up, (1 + b3) * weights[k]), atol=1e-9, rtol=0)
        torch.testing.assert_close(down, torch.full_like(down, -b3 * weights[k]), atol=1e-9, rtol=0)


@each_count
@laws
@given(b1=b1s, alpha=alphas)
def test_between_equal_factors_alpha_is_a_threshold(m: int, b1: float, alpha: float) -> None:
    every = vectors(m)
    level = torch.arange(2**m, dtype=F64) / (2**m - 1)
    clear = (level - alpha).abs() > 1e-9
    assert torch.equal(label(every, every, b1, alpha).sign()[clear], (level - alpha).sign()[clear])


@each_count
@pytest.mark.parametrize("b1", [1.2, 3.0, 30.0])
def test_where_the_threshold_stands_among_the_vectors(m: int, b1: float) -> None:
    every, step = vectors(m), 1 / (2**m - 1)
    positive = {alpha: label(every, every, b1, alpha) > 0 for alpha in (step / 2, 0.5, 1 - step / 2)}
    assert torch.equal(positive[step / 2], every.any(-1))  # at least one factor holds
    assert torch.equal(positive[0.5], every[:, 0] > 0)  # the first factor holds
    assert torch.equal(positive[1 - step / 2], every.all(-1))  # all hold


def around(edge: float) -> Iterator[float]:
    yield from (b1 for b1 in (edge * (1 - 1e-4), edge * (1 + 1e-4)) if b1 > 1)


@each_count
@pytest.mark.parametrize("alpha", [0.1, 0.35, 0.5, 0.8])
def test_sign_puts_factors_before_helpfulness_exactly_for_small_b1(m: int, alpha: float) -> None:
    """g has the sign of S_w - S_l where that is not 0 iff b1 / (b1 - 1) > max(alpha, 1 - alpha) (2^m - 1)."""
    w, l = cells(m)  # noqa: E741
    numbers = 2.0 ** torch.arange(m - 1, -1, -1, dtype=F64)
    wanted = ((w - l) @ numbers).sign()
    differ = wanted != 0
    needed = max(alpha, 1 - alpha) * (2**m - 1)
    edge = needed / (needed - 1) if needed > 1 else float("inf")
    for b1 in around(edge) if needed > 1 else (1.01, 3.0, 1e3):
        holds = bool((label(w, l, b1, alpha).sign() == wanted)[differ].all())
        assert holds == (b1 < edge)


@each_count
def test_cells_stand_by_w_first_exactly_for_large_b1(m: int) -> None:
    """By S_w, then by -S_l, iff b1 > 2^m - 1: for m = 1 always, the order of BFPO's four cells."""
    w, l = cells(m)  # noqa: E741
    numbers = 2.0 ** torch.arange(m - 1, -1, -1, dtype=F64)
    order = ((w @ numbers) * 2**m - l @ numbers).argsort()
    edge = 2**m - 1
    for b1 in around(edge) if m > 1 else (1.01, 3.0, 1e3):
        assert bool((label(w, l, b1, 0.5)[order].diff() > 0).all()) == (b1 > edge)


@pytest.mark.parametrize("m", range(2, 6))
@laws
@given(b1=st.floats(1.001, 200), alpha=alphas)
def test_no_b1_gives_both_orders_for_two_factors_or_more(m: int, b1: float, alpha: float) -> None:
    factors_first = b1 / (b1 - 1) > max(alpha, 1 - alpha) * (2**m - 1)
    assert not (factors_first and b1 > 2**m - 1)


def test_published_setting_has_a_zero_label_with_two_factors() -> None:
    """b1 = 3, alpha = 1/2 stands on the edge of both orders at m = 2."""
    neither, second = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert label(second, neither, 3.0, 0.5).item() == pytest.approx(0, abs=1e-6)


@each_count
def test_labels_keep_bfpos_range_while_their_steps_shrink(m: int) -> None:
    w, l = cells(m)  # noqa: E741
    labels = label(w, l, 3.0, 0.5)
    assert (labels.min().item(), labels.max().item()) == pytest.approx((-1.0, 1.0))
    best_l = (l == 1).all(-1)
    steps = labels[best_l].sort().values.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 1.5 / (2**m - 1)))


# --- probabilities ------------------------------------------------------------------------------


@laws
@given(settings_of())
def test_label_at_probabilities_is_the_mean_over_labels_however_they_depend(case: tuple) -> None:
    """Any joint distribution of all 2m labels gives the label at its marginals; independence is one."""
    m, weights, b1, alpha, seed = case
    if m > 3:
        m, weights = 3, tuple(c / sum(weights[:3]) for c in weights[:3])
    g = torch.Generator().manual_seed(seed)
    w, l = cells(m)  # noqa: E741
    given_labels = factors_label(factors_w=w, factors_l=l, weights=weights, b1=b1, alpha=alpha)
    marginals = torch.rand(2 * m, generator=g, dtype=F64)
    both = torch.cat([w, l], -1)
    independent = torch.where(both > 0, marginals, 1 - marginals).prod(-1)
    dependent = torch.rand(len(w), generator=g, dtype=F64)
    for joint in (independent, dependent / dependent.sum()):
        p = (joint[:, None] * both).sum(0, keepdim=True)
        at_p = factors_label(factors_w=p[:, :m], factors_l=p[:, m:], weights=weights, b1=b1, alpha=alpha)
        assert at_p.item() == pytest.approx((joint * given_labels).sum().item(), abs=1e-9)


@laws
@given(settings_of())
def test_renaming_the_factors_changes_nothing(case: tuple) -> None:
    m, weights, b1, alpha, seed = case
    g = torch.Generator().manual_seed(seed)
    w, l = torch.rand(2, 9, m, generator=g, dtype=F64)  # noqa: E741
    order = torch.randperm(m, generator=g)
    renamed = tuple(weights[k] for k in order.tolist())
    torch.testing.assert_close(
        factors_label(factors_w=w[:, order], factors_l=l[:, order], weights=renamed, b1=b1, alpha=alpha),
        factors_label(factors_w=w, factors_l=l, weights=weights, b1=b1, alpha=alpha),
    )


# --- the theory with S for s --------------------------------------------------------------------


@laws
@given(settings_of())
def test_the_bilinear_reward_carries_over_however_factors_depend(case: tuple) -> None:
    """Only that S is uncorrelated with the comparison matters, not how factors depend on each other."""
    m, weights, b1, alpha, seed = case
    g, tau = torch.Generator().manual_seed(seed), 0.1
    factors = (torch.rand(5, 8, m, generator=g, dtype=F64) < 0.5).to(F64)
    factors[..., 1:] *= factors[..., :1]  # none of the others holds without the first
    score = factors_score(factors, weights)
    problem = uncorrelated_problem(score, g)
    constants = Constants.of_shift(problem.mean_safety, b1=b1, alpha=alpha, tau=tau)
    ref = problem.mu.log()
    rl = rl_optimum(bilinear_reward(problem, constants), constants.tau_rl, ref)
    # the supervised optimum from `factors_label`, pair by pair
    wins = torch.zeros(5, 8, 8, dtype=F64)
    for i, j in itertools.product(range(8), repeat=2):
        pair = {"factors_w": factors[:, i], "factors_l": factors[:, j]}
        wins[:, i, j] = factors_label(**pair, weights=weights, b1=b1, alpha=alpha)
    labels = problem.preference * wins - (1 - problem.preference) * wins.mT
    supervised = ((labels * problem.mu[:, None, :]).sum(-1) / tau + ref).log_softmax(-1)
    assert total_variation(rl, supervised).max() < 1e-10


def test_gap_of_the_score_is_the_weighted_gap_of_the_factors() -> None:
    g = torch.Generator().manual_seed(0)
    base = independent_ranking_problem(1, 9, g)
    factors = (torch.rand(9, 3, generator=g, dtype=F64) < 0.5).to(F64)
    weights = lexicographic_weights(3)

    def gap(safety: Tensor) -> Tensor:
        return Problem(base.mu[0], base.preference[0], safety).gap()

    expected = sum(c * gap(factors[:, k]) for k, c in enumerate(weights))
    torch.testing.assert_close(gap(factors_score(factors, weights)), expected)


def test_a_product_of_shifted_factors_makes_two_faults_a_merit() -> None:
    """Why the score is a sum: (s_1 - 1/2)(s_2 - 1/2) is as high for two faults as for none."""
    every, weights = vectors(2), lexicographic_weights(2)
    product = (every - 0.5).prod(-1)
    assert product[0] == product[-1] > product[1] == product[2]
    assert bool((factors_score(every, weights).diff() > 0).all())


@pytest.mark.parametrize("m", [1, 2, 3])
@laws
@given(seed=st.integers(0, 10**6), n=st.integers(2, 10), closer=st.floats(0, 1))
def test_small_b1_puts_factors_before_helpfulness_at_the_optimum(
    m: int, seed: int, n: int, closer: float
) -> None:
    """b3 >= 2^m - 2 and alpha = 1/2: log(pi / ref) rises with S over any ranking and any factors."""
    g = torch.Generator().manual_seed(seed)
    ranked = independent_ranking_problem(1, n, g)
    score = torch.randint(2**m, (n,), generator=g).to(F64) / (2**m - 1)
    b3 = max(2**m - 2, 0.01) + closer
    problem = Problem(ranked.mu[0], ranked.preference[0], score)
    ref = problem.mu.log()
    log_ratio = supervised_optimum(problem, b1=1 + 1 / b3, alpha=0.5, tau=1.0, ref_logps=ref) - ref
    higher = score[:, None] > score[None, :]
    assert bool(((log_ratio[:, None] - log_ratio[None, :])[higher] > 0).all())
