"""Finite action sets: closed forms against other ways to solve the same problem, and the gap between them."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bfpo_exp.errors import UserError
from bfpo_exp.losses import bfpo_label, bfpo_loss, ipo_loss
from bfpo_exp.theory import (
    Constants,
    Problem,
    bfpo_label_matrix,
    bilinear_reward,
    by_size,
    by_strength,
    compare_optima,
    in_wanted_order,
    independent_ranking_problem,
    ipo_label_matrix,
    kl_divergence,
    levels_problem,
    order_by_shift,
    pairwise_optimum,
    preference_matrix,
    rl_optimum,
    shift_band,
    spread,
    supervised_optimum,
    total_variation,
    uncorrelated_problem,
    weighted_pairwise_optimum,
)

F64 = torch.float64
EXACT = 1e-10
laws = settings(max_examples=40, deadline=None)
seeds, b1s, shifts, taus = (
    st.integers(0, 10**6),
    st.floats(1.05, 20),
    st.floats(0.01, 0.99),
    st.sampled_from([1.0, 0.1, 0.01]),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_problem(seed: int, n: int, probabilities: bool = False) -> Problem:
    """Any mu, any preferences, any labels: helpfulness and safety are correlated by chance."""
    g = generator(seed)
    mu = torch.rand(n, generator=g, dtype=F64) + 0.1
    upper = torch.rand(n, n, generator=g, dtype=F64).triu(1)
    preference = upper + (1 - upper.mT).tril(-1) + 0.5 * torch.eye(n, dtype=F64)
    safety = torch.rand(n, generator=g, dtype=F64)
    return Problem(mu / mu.sum(), preference, safety if probabilities else (safety < 0.5).to(F64))


def random_ref(seed: int, n: int) -> Tensor:
    return torch.randn(n, generator=generator(seed + 1), dtype=F64).log_softmax(-1)


def ranking(labels: list[float] | Tensor) -> Problem:
    """y1 > y2 > ... strictly, equally likely."""
    safety = torch.as_tensor(labels, dtype=F64)
    n = safety.shape[-1]
    helpfulness = torch.arange(n, 0, -1, dtype=F64)
    return Problem(torch.full((n,), 1 / n, dtype=F64), preference_matrix(helpfulness), safety)


def least_squares(labels: Tensor, tau: float, weights: Tensor, ref_logps: Tensor) -> Tensor:
    """The optimum from a dense design matrix, one row a pair, by `torch.linalg.lstsq`."""
    n = len(labels)
    rows, targets = [], []
    for i, j in itertools.product(range(n), repeat=2):
        row = torch.zeros(n, dtype=F64)
        row[i] += 1
        row[j] -= 1
        rows.append(weights[i, j].sqrt() * row)
        targets.append(weights[i, j].sqrt() * labels[i, j] / tau)
    # minimum-norm solution: the design has the constants as its null space
    solved = torch.linalg.lstsq(torch.stack(rows), torch.stack(targets)[:, None], driver="gelsd")
    return (ref_logps + solved.solution[:, 0]).log_softmax(-1)


def minimise(loss, n: int) -> Tensor:
    """Log-probs of the softmax policy that minimises ``loss(log_pi)``, by L-BFGS from uniform."""
    theta = torch.zeros(n, dtype=F64, requires_grad=True)
    search = torch.optim.LBFGS(
        [theta], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(theta.log_softmax(-1))
        value.backward()
        return value

    search.step(closure)
    return theta.detach().log_softmax(-1)


# --- pairwise least squares ---------------------------------------------------------------------


@laws
@given(seeds, st.integers(2, 7), taus)
def test_closed_form_is_the_least_squares_solution(seed: int, n: int, tau: float) -> None:
    noise = torch.randn(n, n, generator=generator(seed), dtype=F64)
    labels, ref = noise - noise.mT, random_ref(seed, n)
    solved = least_squares(labels, tau, torch.ones(n, n, dtype=F64), ref)
    torch.testing.assert_close(pairwise_optimum(labels, tau, ref), solved, atol=1e-8, rtol=EXACT)


@laws
@given(seeds, st.integers(2, 7), taus)
def test_weighted_closed_form_is_the_least_squares_solution(seed: int, n: int, tau: float) -> None:
    g = generator(seed)
    noise = torch.randn(n, n, generator=g, dtype=F64)
    labels, ref = noise - noise.mT, random_ref(seed, n)
    weights = torch.rand(n, n, generator=g, dtype=F64) + 0.05  # not symmetric: an order may be drawn more
    solved = least_squares(labels, tau, weights, ref)
    torch.testing.assert_close(
        weighted_pairwise_optimum(labels, tau, weights, ref), solved, atol=1e-8, rtol=EXACT
    )


def test_bfpo_and_ipo_losses_are_minimised_where_the_closed_form_says() -> None:
    problem, tau, b1, alpha = ranking([1, 0, 0, 1, 0]), 0.5, 3.0, 0.4
    ref, n = random_ref(3, 5), 5
    w, l = map(list, zip(*itertools.combinations(range(n), 2), strict=True))  # noqa: E741

    def losses(log_pi: Tensor) -> dict[str, Tensor]:
        logps = {"policy_w": log_pi[w], "policy_l": log_pi[l], "ref_w": ref[w], "ref_l": ref[l]}
        safety = {"safe_w": problem.safety[w], "safe_l": problem.safety[l]}
        return {
            "bfpo": bfpo_loss(**logps, **safety, beta=tau, b1=b1, alpha=alpha),
            "ipo": ipo_loss(**logps, beta=tau),
        }

    matrices = {
        "bfpo": bfpo_label_matrix(problem.preference, problem.safety, b1=b1, alpha=alpha),
        "ipo": ipo_label_matrix(problem.preference),
    }
    for name, labels in matrices.items():
        trained = minimise(lambda log_pi, name=name: losses(log_pi)[name].mean(), n)
        torch.testing.assert_close(pairwise_optimum(labels, tau, ref), trained, atol=1e-6, rtol=0)


def test_a_batch_is_solved_as_its_members() -> None:
    problem = independent_ranking_problem(6, 5, generator(0))
    labels = bfpo_label_matrix(problem.preference, problem.safety, b1=3.0, alpha=0.5)
    tau = torch.linspace(0.1, 1, 6, dtype=F64)
    together = pairwise_optimum(labels, tau)
    weights = torch.ones(5, 5, dtype=F64)
    for i in range(6):
        torch.testing.assert_close(together[i], pairwise_optimum(labels[i], tau[i].item()))
    torch.testing.assert_close(weighted_pairwise_optimum(labels, tau, weights), together, atol=EXACT, rtol=0)


def test_uniform_weights_without_self_pairs_change_nothing() -> None:
    problem = ranking([0, 1, 1, 0])
    labels = bfpo_label_matrix(problem.preference, problem.safety, b1=3.0, alpha=0.5)
    weights = 1 - torch.eye(4, dtype=F64)
    expected = pairwise_optimum(labels, 0.1)
    torch.testing.assert_close(weighted_pairwise_optimum(labels, 0.1, weights), expected, atol=EXACT, rtol=0)


def test_what_has_no_unique_optimum_is_refused() -> None:
    labels = ipo_label_matrix(preference_matrix(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64)))
    split = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).to(F64)
    with pytest.raises(UserError, match="unconnected"):
        weighted_pairwise_optimum(labels, 1.0, split)
    with pytest.raises(UserError, match="negative"):
        weighted_pairwise_optimum(labels, 1.0, -torch.ones(4, 4, dtype=F64))
    with pytest.raises(UserError, match="skew"):
        pairwise_optimum(labels + 0.1, 1.0)
    with pytest.raises(UserError, match="shape"):
        pairwise_optimum(labels[:3], 1.0)
    # a chain is enough to connect them
    chain = torch.diag(torch.ones(3, dtype=F64), 1)
    log_pi = weighted_pairwise_optimum(labels, 1.0, chain)
    torch.testing.assert_close(log_pi.diff(), torch.full((3,), -0.5, dtype=F64))


# --- the label ----------------------------------------------------------------------------------


@laws
@given(seeds, b1s, shifts)
def test_label_is_skew_symmetric_and_the_mean_over_drawn_labels(seed: int, b1: float, alpha: float) -> None:
    problem = random_problem(seed, 4, probabilities=True)
    matrix = bfpo_label_matrix(problem.preference, problem.safety, b1=b1, alpha=alpha)
    torch.testing.assert_close(matrix, -matrix.mT, atol=1e-12, rtol=0)
    for i, j in itertools.permutations(range(4), 2):
        mean = 0.0
        for s_i, s_j, wins in itertools.product((0, 1), repeat=3):
            chance = math.prod(
                p if drawn else 1 - p
                for p, drawn in (
                    (problem.safety[i].item(), s_i),
                    (problem.safety[j].item(), s_j),
                    (problem.preference[i, j].item(), wins),
                )
            )
            more, less = (s_i, s_j) if wins else (s_j, s_i)
            mean += chance * (1 if wins else -1) * ((b1 * more - less) / (b1 - 1) - alpha)
        assert matrix[i, j].item() == pytest.approx(mean, abs=1e-9)


@laws
@given(b1s, st.floats(-1, 1))
def test_shift_of_the_safety_label_is_alpha(b1: float, a: float) -> None:
    """s + a in both places = B2 = (b1 - 1) a inside the label = alpha of -a."""
    b3 = 1 / (b1 - 1)
    s_w, s_l = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=F64)
    shifted = b3 * (b1 * (s_w + a) - (s_l + a))
    inside = b3 * (b1 * s_w - s_l + (b1 - 1) * a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        label = bfpo_label(safe_w=s_w, safe_l=s_l, b1=b1, alpha=-a)
    torch.testing.assert_close(shifted, label, atol=1e-9, rtol=0)
    torch.testing.assert_close(inside, label, atol=1e-9, rtol=0)


@laws
@given(st.floats(1.001, 1e4), st.floats(-3, 3))
def test_four_cells_are_in_order_exactly_for_alpha_between_0_and_1(b1: float, alpha: float) -> None:
    """And the outer cells change sign at alpha = -b3 and at alpha = 1 + b3."""
    s_w, s_l = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        su, ss, uu, us = bfpo_label(safe_w=s_w, safe_l=s_l, b1=b1, alpha=alpha).tolist()
    assert su > ss > uu > us
    assert (su > ss > 0 > uu > us) == (0 < alpha < 1)
    b3 = 1 / (b1 - 1)
    assert (us < 0) == (alpha > -b3) or math.isclose(alpha, -b3, abs_tol=1e-9)
    assert (su > 0) == (alpha < 1 + b3) or math.isclose(alpha, 1 + b3, abs_tol=1e-9)


def test_at_one_half_a_mixed_pair_has_one_size_whichever_is_more_helpful() -> None:
    for b1 in (1.5, 3.0, 10.0):
        one, zero = torch.ones(1), torch.zeros(1)
        up = bfpo_label(safe_w=one, safe_l=zero, b1=b1, alpha=0.5)
        down = bfpo_label(safe_w=zero, safe_l=one, b1=b1, alpha=0.5)
        expected = 0.5 + 1 / (b1 - 1)
        assert up.item() == pytest.approx(expected)
        assert down.item() == pytest.approx(-expected)


# --- the two problems ---------------------------------------------------------------------------


@laws
@given(seeds, st.integers(2, 6))
def test_rl_optimum_maximises_its_objective(seed: int, n: int) -> None:
    reward = torch.randn(n, generator=generator(seed), dtype=F64)
    ref, tau = random_ref(seed, n), 0.7

    def cost(log_pi: Tensor) -> Tensor:
        return tau * kl_divergence(log_pi, ref) - (log_pi.exp() * reward).sum()

    torch.testing.assert_close(rl_optimum(reward, tau, ref), minimise(cost, n), atol=1e-5, rtol=0)


@laws
@given(seeds, st.integers(2, 7), b1s, shifts, taus)
def test_supervised_optimum_solves_the_product_weights(
    seed: int, n: int, b1: float, alpha: float, tau: float
) -> None:
    problem, ref = random_problem(seed, n, probabilities=True), random_ref(seed, n)
    labels = bfpo_label_matrix(problem.preference, problem.safety, b1=b1, alpha=alpha)
    solved = weighted_pairwise_optimum(labels, tau, torch.outer(problem.mu, problem.mu), ref)
    closed = supervised_optimum(problem, b1=b1, alpha=alpha, tau=tau, ref_logps=ref)
    torch.testing.assert_close(closed, solved, atol=1e-7, rtol=1e-9)


def drawn(g: torch.Generator) -> Tensor:
    """20 rows of 7 labels, each with one safe and one unsafe action at least."""
    labels = (torch.rand(20, 7, generator=g, dtype=F64) < 0.5).to(F64)
    labels[:, 0], labels[:, 1] = 1, 0
    return labels


UNCORRELATED = {
    "levels": lambda g: levels_problem(20, 5, g),
    "any": lambda g: uncorrelated_problem(drawn(g), g),
    "probabilities": lambda g: uncorrelated_problem(torch.rand(20, 7, generator=g, dtype=F64), g),
    "all safe": lambda g: uncorrelated_problem(torch.ones(20, 7, dtype=F64), g),
    "constant gap": lambda g: uncorrelated_problem(drawn(g), g, offset=-0.6),
}


@pytest.mark.parametrize("kind", sorted(UNCORRELATED))
@laws
@given(seeds, b1s, st.floats(-2, 2), st.floats(0.1, 3), taus)
def test_the_optima_agree_where_the_gap_is_constant(
    kind: str, seed: int, b1: float, b2: float, b3: float, tau: float
) -> None:
    """For every label b3 (b1 s_w - s_l + b2), not only the one with b3 (b1 - 1) = 1."""
    problem = UNCORRELATED[kind](generator(seed))
    assert spread(problem.gap()).max() < 1e-14
    if kind == "constant gap":
        assert problem.gap().abs().min() > 1e-4  # so that zero is not what is tested
    else:
        assert problem.gap().abs().max() < 1e-14
    constants = Constants.of_label(problem.mean_safety, b1=b1, b2=b2, b3=b3, tau=tau)
    rl = rl_optimum(bilinear_reward(problem, constants), constants.tau_rl, problem.mu.log())
    s, p = problem.safety, problem.preference
    wins = b3 * (b1 * s[:, :, None] - s[:, None, :] + b2)
    labels = p * wins - (1 - p) * wins.mT
    supervised = ((labels * problem.mu[:, None, :]).sum(-1) / tau + problem.mu.log()).log_softmax(-1)
    size = labels.abs().max().item() / tau  # nats, to which rounding is relative
    assert total_variation(rl, supervised).max() < EXACT
    assert (rl - supervised).abs().max() < 1e-12 * max(1.0, size)


@laws
@given(seeds, b1s, shifts, taus)
def test_shifted_constants_are_those_of_the_label(seed: int, b1: float, alpha: float, tau: float) -> None:
    mean = torch.rand(3, generator=generator(seed), dtype=F64)
    b3 = 1 / (b1 - 1)
    general = Constants.of_label(mean, b1=b1, b2=-alpha / b3, b3=b3, tau=tau)
    shift = Constants.of_shift(mean, b1=b1, alpha=alpha, tau=tau)
    torch.testing.assert_close(shift.a1, general.a1)
    assert (shift.a2, shift.tau_rl) == pytest.approx((general.a2, general.tau_rl))


@pytest.mark.parametrize("wrong", [{"a1": 0.05}, {"a2": 0.05}, {"tau_rl": 0.05}])
def test_no_other_constants_will_do(wrong: dict[str, float]) -> None:
    problem, tau = levels_problem(20, 5, generator(0)), 0.1
    right = Constants.of_shift(problem.mean_safety, b1=3.0, alpha=0.5, tau=tau)
    other = Constants(
        a1=right.a1 + wrong.get("a1", 0.0),
        a2=right.a2 + wrong.get("a2", 0.0),
        tau_rl=right.tau_rl + wrong.get("tau_rl", 0.0),
    )
    ref = problem.mu.log()
    supervised = supervised_optimum(problem, b1=3.0, alpha=0.5, tau=tau, ref_logps=ref)
    assert spread(supervised - rl_optimum(bilinear_reward(problem, other), other.tau_rl, ref)).min() > 0.1


# --- the gap ------------------------------------------------------------------------------------


@laws
@given(seeds, st.integers(2, 8))
def test_gap_is_its_definition_and_its_mean_is_minus_the_covariance(seed: int, n: int) -> None:
    problem = random_problem(seed, n, probabilities=True)
    mu, s, pref = problem.mu.tolist(), problem.safety.tolist(), problem.preference.tolist()
    p = [sum(mu[j] * pref[i][j] for j in range(n)) for i in range(n)]
    mean = sum(mu[j] * s[j] for j in range(n))
    gap = [sum(mu[j] * pref[i][j] * s[j] for j in range(n)) - p[i] * mean for i in range(n)]
    assert problem.gap().tolist() == pytest.approx(gap, abs=1e-14)
    covariance = sum(mu[i] * (p[i] - 0.5) * (s[i] - mean) for i in range(n))
    assert sum(mu[i] * gap[i] for i in range(n)) == pytest.approx(-covariance, abs=1e-14)
    assert problem.gap().abs().max() <= 0.25


@laws
@given(seeds, st.integers(2, 8), b1s, shifts, taus)
def test_the_optima_differ_by_the_gap_and_by_no_more(
    seed: int, n: int, b1: float, alpha: float, tau: float
) -> None:
    problem, ref = random_problem(seed, n), random_ref(seed, n)
    constants = Constants.of_shift(problem.mean_safety, b1=b1, alpha=alpha, tau=tau)
    rl = rl_optimum(bilinear_reward(problem, constants), tau, ref)
    supervised = supervised_optimum(problem, b1=b1, alpha=alpha, tau=tau, ref_logps=ref)
    assert spread(supervised - rl - problem.gap() / tau) < 1e-8
    distance = compare_optima(problem, b1=b1, alpha=alpha, tau=tau)
    wide = spread(problem.gap()).item() / tau
    assert distance.log_ratio.item() == pytest.approx(wide, abs=1e-8)
    assert distance.kl.item() <= wide**2 / 8 + 1e-9
    assert distance.total_variation.item() <= math.tanh(wide / 4) + 1e-9


@laws
@given(seeds)
def test_two_actions_have_no_gap_that_matters(seed: int) -> None:
    assert spread(random_problem(seed, 2, probabilities=True).gap()) < 1e-14


def test_the_papers_bandit_has_a_constant_gap() -> None:
    problem = ranking([1, 0, 1, 0])
    torch.testing.assert_close(problem.gap(), torch.full((4,), -1 / 16, dtype=F64))
    assert compare_optima(problem, b1=3.0, alpha=0.5, tau=0.1).total_variation < EXACT
    assert compare_optima(ranking([1, 1, 0, 0]), b1=3.0, alpha=0.5, tau=0.1).total_variation > 0.1


@pytest.mark.parametrize("n", range(2, 9))
def test_a_strict_ranking_is_exact_only_if_labels_are_equal_or_alternate(n: int) -> None:
    for labels in itertools.product((0.0, 1.0), repeat=n):
        alternate = n % 2 == 0 and all(a != b for a, b in itertools.pairwise(labels))
        exact = spread(ranking(list(labels)).gap()) < 1e-12
        assert exact == (alternate or len(set(labels)) == 1), labels


def test_distances_are_those_of_two_coins() -> None:
    p, q = torch.tensor([0.5, 0.5], dtype=F64).log(), torch.tensor([0.25, 0.75], dtype=F64).log()
    assert total_variation(p, q).item() == pytest.approx(0.25)
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_measured_distances_vanish_without_correlation_and_grow_with_it() -> None:
    small, none, large = by_strength([-0.2, 0.0, 0.8], [0.1], levels=5, count=50)
    assert none.by_tau[0.1].total_variation.max() < EXACT
    assert none.gap_spread.max() < EXACT < small.gap_spread.median() < large.gap_spread.median()
    assert small.correlation.max() < 0 < large.correlation.min()
    two, many = by_size([2, 20], [0.1], count=50)
    assert two.by_tau[0.1].total_variation.max() < EXACT < many.by_tau[0.1].total_variation.median()


# --- the order of the optimum -------------------------------------------------------------------


def test_wanted_order_is_the_papers() -> None:
    helpfulness, safety = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert in_wanted_order(torch.tensor([4.0, 1.0, 3.0, 2.0]), helpfulness, safety)  # y1 > y3 > y4 > y2
    assert not in_wanted_order(torch.tensor([4.0, 2.0, 3.0, 1.0]), helpfulness, safety)
    assert not in_wanted_order(torch.tensor([4.0, 1.0, 4.0, 2.0]), helpfulness, safety)  # a tie


@pytest.mark.parametrize("n", range(2, 8))
@pytest.mark.parametrize("b1", [1.2, 3.0, 1e4])
def test_band_of_shifts_is_where_every_labelling_gets_the_wanted_order(n: int, b1: float) -> None:
    labellings = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n)), dtype=F64)
    problem = ranking(labellings)
    low, high = shift_band(n)

    def all_right(alpha: float) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            labels = bfpo_label_matrix(problem.preference, labellings, b1=b1, alpha=alpha)
        return bool(in_wanted_order(pairwise_optimum(labels, 0.5), problem.win_rate, labellings).all())

    assert all(all_right(alpha) for alpha in (low + 1e-6, 0.5, high - 1e-6))
    assert not any(all_right(alpha) for alpha in (low - 1e-6, high + 1e-6))


@laws
@given(seeds, st.integers(2, 12), st.floats(1.05, 100), st.floats(0.2, 50))
def test_one_half_gives_the_wanted_order_for_any_mu_and_noisy_preferences(
    seed: int, n: int, b1: float, steepness: float
) -> None:
    g = generator(seed)
    helpfulness = torch.randperm(n, generator=g).to(F64)
    mu = torch.rand(n, generator=g, dtype=F64) + 0.05
    preference = torch.sigmoid(steepness / n * (helpfulness[:, None] - helpfulness[None, :]))
    safety = (torch.rand(n, generator=g, dtype=F64) < 0.5).to(F64)
    problem, ref = Problem(mu / mu.sum(), preference, safety), random_ref(seed, n)
    log_pi = supervised_optimum(problem, b1=b1, alpha=0.5, tau=0.1, ref_logps=ref)
    assert in_wanted_order(log_pi - ref, helpfulness, safety)


def test_share_in_order_is_whole_at_one_half_only() -> None:
    low, half, high = order_by_shift([0.2, 0.5, 0.8], n=8, count=100)
    assert half == 1.0
    assert max(low, high) < 0.5
