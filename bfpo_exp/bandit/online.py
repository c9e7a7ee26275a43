"""PPO on a bandit, where the optimum is known: the functions of `bfpo_exp.online` on one-token responses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bfpo_exp.online.advantages import group_scale, leave_one_out
from bfpo_exp.online.ppo import clipped, k1, k3
from bfpo_exp.runtime import cpu_threads

Estimate = Literal["k1", "k3", "exact"]


@cpu_threads(1)  # tensors this small only wait for one another's threads
def run_online_bandit(
    reward: Tensor,
    beta: float,
    *,
    kl: Estimate = "k1",
    seeds: int = 5,
    rollouts: int = 600,
    samples: int = 512,
    epochs: int = 2,
    clip: float = 0.2,
    lr: float = 0.05,
    normalised: bool = False,
) -> Tensor:
    """Log-probs of policies softmax(theta) trained by PPO from the uniform reference; float64 (seeds, n).

    Args:
        reward: g of each of the n actions, (n,).
        beta: the KL penalty.
        kl: the estimate that the penalty is made of.
        seeds: policies that are trained, each on samples of its own.
        samples: actions drawn in a rollout, which are the responses to one prompt.
        epochs: steps on each rollout.
        lr: Adam's, falling linearly to 0.
        normalised: advantages over the standard deviation of the rollout's returns.
    """
    reward = reward.double()
    theta = torch.zeros(seeds, len(reward), dtype=torch.float64, requires_grad=True)
    reference = torch.zeros(len(reward), dtype=torch.float64).log_softmax(-1)
    adam = torch.optim.Adam([theta], lr=lr)
    total = rollouts * epochs
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / total)
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    for _ in range(rollouts):
        old = theta.detach().log_softmax(-1)
        drawn = zip(old.exp(), generators, strict=True)
        actions = torch.stack([p.multinomial(samples, True, generator=g) for p, g in drawn])
        before, of_reference = old.gather(1, actions), reference[actions]
        returns = reward[actions] - beta * _estimate(kl, before, of_reference, old, reference)
        scale = group_scale(returns) if normalised else torch.ones_like(returns[:, :1])
        for _ in range(epochs):
            policy = theta.log_softmax(-1)
            logps = policy.gather(1, actions)
            loss, _ = clipped(logps, before, leave_one_out(returns) * scale, clip)
            direct = 0.0 if kl == "k1" else _estimate(kl, logps, of_reference, policy, reference)
            adam.zero_grad()
            (loss + beta * scale * direct).mean(1).sum().backward()
            adam.step()
            decay.step()
    return theta.detach().log_softmax(-1)


def _estimate(kl: Estimate, logps: Tensor, reference: Tensor, policy: Tensor, every: Tensor) -> Tensor:
    """The KL estimate at each sample, (seeds, samples); the exact one is the same at all of them."""
    if kl == "exact":
        return (policy.exp() * (policy - every)).sum(-1, keepdim=True).expand_as(logps)
    return {"k1": k1, "k3": k3}[kl](logps, reference)
