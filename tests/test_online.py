"""PPO on the policy's own samples: its pure functions by hand, and its optimum on the bandit."""

from __future__ import annotations

import math

import pytest
import torch

from bfpo_exp.bandit.online import run_online_bandit
from bfpo_exp.online.advantages import generalised, group_scale, leave_one_out
from bfpo_exp.online.controls import adapted, ascended
from bfpo_exp.online.exact import exact_kl
from bfpo_exp.online.ppo import clipped, k1, k3, value_loss
from bfpo_exp.theory.bilinear import Constants, Problem, bilinear_reward, rl_optimum

BETA = 0.3


def bandit() -> Problem:
    """The paper's bandit: four actions, the first the most helpful, safe where odd."""
    rank = torch.arange(4, dtype=torch.float64)
    return Problem(
        mu=torch.full((4,), 0.25, dtype=torch.float64),
        preference=torch.sigmoid(rank[None, :] - rank[:, None]),
        safety=torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64),
    )


def rewards() -> dict[str, torch.Tensor]:
    problem = bandit()
    constants = Constants.of_shift(problem.mean_safety, b1=3.0, alpha=0.5, tau=BETA)
    return {
        "linear": 0.5 * problem.win_rate + 0.5 * problem.safety,
        "bilinear": bilinear_reward(problem, constants),
    }


def distance(logps: torch.Tensor, optimum: torch.Tensor) -> torch.Tensor:
    """Total variation of each policy from the optimum."""
    return 0.5 * (logps.exp() - optimum.exp()).abs().sum(-1)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kl", ["k1", "k3", "exact"])
@pytest.mark.parametrize("rule", ["linear", "bilinear"])
def test_ppo_comes_to_the_known_optimum(rule: str, kl: str, normalised: bool) -> None:
    reward = rewards()[rule]
    optimum = rl_optimum(reward, BETA, torch.zeros(4, dtype=torch.float64))
    uniform = distance(torch.full((4,), 0.25).log(), optimum)
    found = run_online_bandit(reward, BETA, kl=kl, normalised=normalised)  # type: ignore[arg-type]
    assert uniform > 0.1  # there was a way to go
    assert (distance(found, optimum) < 2e-2).all(), distance(found, optimum)


def test_half_of_a_k3_penalty_has_another_optimum() -> None:
    """k3 in the loss alone, as is often done, holds the policy to ref by KL(ref || pi)."""
    reward = rewards()["bilinear"]
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    reference = torch.full((4,), 0.25, dtype=torch.float64).log()
    adam = torch.optim.Adam([theta], lr=0.02)
    for _ in range(3000):
        logps = theta.log_softmax(-1)
        p = logps.detach().exp()
        loss = (p * (-reward * logps + BETA * k3(logps, reference))).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    optimum = rl_optimum(reward, BETA, torch.zeros(4, dtype=torch.float64))
    assert distance(theta.detach().log_softmax(-1), optimum) > 3e-2


def test_advantages_by_hand() -> None:
    returns = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = [[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]
    torch.testing.assert_close(leave_one_out(returns), torch.tensor(expected))
    torch.testing.assert_close(group_scale(returns)[1], torch.tensor([1 / math.sqrt(3)]))


def test_generalised_advantages_end_with_the_response() -> None:
    rewards = torch.tensor([[0.0, 1.0, 5.0], [0.0, 0.0, 2.0]])
    values = torch.tensor([[0.5, 0.25, 9.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages, returns = generalised(rewards, values, mask, 1.0, 0.5)
    # deltas of the first: 0 + 0.25 - 0.5, 1 - 0.25; of the second: 0, 0, 2 - 1
    torch.testing.assert_close(advantages, torch.tensor([[-0.25 + 0.375, 0.75, 0.0], [0.25, 0.5, 1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.625, 1.0, 0.0], [1.25, 1.5, 2.0]]))


def test_clipping_by_hand() -> None:
    old = torch.zeros(4)
    logps = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    loss, held = clipped(logps, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
    assert held.tolist() == [True, False, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 1.5, -0.5, 0.0]))


def test_estimates_of_the_divergence_have_its_mean() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimate in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimate(policy, reference)).sum(), exact)
    assert (k3(policy, reference) >= 0).all()


def test_the_exact_divergence_and_its_gradient() -> None:
    torch.manual_seed(0)
    hidden, of_reference = torch.randn(2, 7, 5)
    weight, other = torch.randn(2, 11, 5)
    hidden.requires_grad_()
    found = exact_kl(hidden, weight, of_reference, other)
    policy, reference = (hidden @ weight.T).log_softmax(-1), (of_reference @ other.T).log_softmax(-1)
    expected = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (wanted,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(gradient, wanted)


def test_a_value_moves_by_the_clip_at_most() -> None:
    old, returns = torch.zeros(2), torch.tensor([1.0, 0.1])
    loss = value_loss(torch.tensor([0.5, 0.1]), old, returns, 0.2)
    torch.testing.assert_close(loss, torch.tensor([0.5 * 0.8**2, 0.0]))


def test_controls_by_hand() -> None:
    assert adapted(0.1, kl=30.0, target=10.0) == pytest.approx(0.102)
    assert adapted(0.1, kl=9.0, target=10.0) == pytest.approx(0.099)
    assert ascended(1.0, cost=0.5, limit=0.25, rate=2.0) == pytest.approx(1.5)
    assert ascended(0.1, cost=0.0, limit=0.25, rate=2.0) == 0.0
