"""How the rewards of a response become one: a pure function each, named by ``combine.rule``.

Rewards come as float32 tensors of shape (n,), one for each of n responses, 1 best and 0 worst:
``helpfulness`` is the probability that a response is preferred to an average one, ``safety`` the
probability that it is safe.  Each function returns the global reward of the responses, float32 (n,), larger
is better.  The rules are those that the BFPO paper lists in its Section C.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bfpo_exp.config.rewards import Bilinear, Combination, Lagrangian, Linear, Llama2, MaxMin

LEAST = 1e-3  # of a probability whose logit is taken, and of a deviation that is divided by
STEPS = 4000  # of fitting weights, a fraction of a second


def combined(rule: Combination, rewards: Mapping[str, Tensor], flagged: Tensor, multiplier: float) -> Tensor:
    """The global reward by a rule of the config, float32 (n,).

    ``flagged``, bool (n,), says which prompts are known to be unsafe to answer (`llama2`); ``multiplier``
    is where dual ascent has brought Safe RLHF's (`lagrangian`).  The other rules read neither.
    """
    match rule:
        case Linear():
            return linear(rewards, rule.weights.model_dump())
        case Llama2():
            return llama2(rewards, flagged, rule.threshold)
        case Lagrangian():
            return lagrangian(rewards, multiplier, rule.normalised)
        case MaxMin():
            return max_min(rewards)
        case Bilinear():
            return bilinear(rewards, rule.a1, rule.a2)


def linear(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum_k w_k r_k: MORL, and Rewarded Soups' training.

    >>> rewards = {"helpfulness": torch.tensor([1.0]), "safety": torch.tensor([0.5])}
    >>> linear(rewards, {"helpfulness": 0.2, "safety": 0.8})
    tensor([0.6000])
    """
    return torch.stack([weights[name] * reward for name, reward in rewards.items()]).sum(0)


def max_min(rewards: Mapping[str, Tensor]) -> Tensor:
    """min_k r_k, so that the worse of the two is what is raised (MaxMin-RLHF, arXiv 2402.08925)."""
    return torch.stack(list(rewards.values())).amin(0)


def bilinear(rewards: Mapping[str, Tensor], a1: float, a2: float) -> Tensor:
    """(s + A1) (p + A2) with s safety and p helpfulness: BFPO's own global reward (its Section 3.3)."""
    return (rewards["safety"] + a1) * (rewards["helpfulness"] + a2)


def lagrangian(rewards: Mapping[str, Tensor], multiplier: float, normalised: bool) -> Tensor:
    """r - lambda c with the cost c = 1 - safety (Safe RLHF, arXiv 2310.12773, eq. 10).

    ``normalised`` divides by 1 + lambda, as its authors' code does: rewards then keep their size beside the
    KL penalty, whatever lambda becomes.
    """
    combined = rewards["helpfulness"] - multiplier * (1 - rewards["safety"])
    return combined / (1 + multiplier) if normalised else combined


def llama2(rewards: Mapping[str, Tensor], flagged: Tensor, threshold: float) -> Tensor:
    """The safety reward where the prompt is ``flagged`` (bool (n,)) or that reward is below the threshold.

    Elsewhere the helpfulness reward; then logits, whitened over the n responses (Llama 2, arXiv 2307.09288,
    Section 3.2.3).
    """
    by_safety = flagged | (rewards["safety"] < threshold)
    chosen = torch.where(by_safety, rewards["safety"], rewards["helpfulness"])
    logits = torch.logit(chosen, eps=LEAST)
    return (logits - logits.mean()) / logits.std(correction=0).clamp_min(LEAST)


def fitted_weights(differences: Tensor, margin: float = 1.0, penalty: float = 0.01) -> Tensor:
    """Weights w >= 0 with which w . (r(y_w) - r(y_l)) orders pairs as wanted: RBR's, fitted by a hinge loss.

    ``differences`` is (pairs, rewards), of the wanted response minus the other.  Minimises the mean of
    max(0, margin - w . d) plus penalty |w|^2 (Rule Based Rewards, arXiv 2411.01111, Section 4.3) by
    projected subgradient steps, and returns the mean of the later half, scaled to sum to 1; float32
    (rewards,).  Where no weights are better than none, they are even.

    >>> fitted_weights(torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.1]])).argmax().item()
    0
    """
    d = differences.double()
    weights = torch.full((d.shape[1],), 1.0 / d.shape[1], dtype=torch.float64)
    total = torch.zeros_like(weights)
    for step in range(STEPS):
        short = (d @ weights < margin).double()
        slope = -(short[:, None] * d).mean(0) + 2 * penalty * weights
        weights = (weights - slope / (1 + 0.1 * step)).clamp_min(0)
        total += weights * (step >= STEPS // 2)
    share = total / total.sum() if total.sum() > 0 else torch.full_like(total, 1.0 / len(total))
    return share.float()
