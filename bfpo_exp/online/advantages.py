"""Advantages of sampled responses over what was to be expected."""

from __future__ import annotations

import torch
from torch import Tensor


def leave_one_out(returns: Tensor) -> Tensor:
    """Each return minus the mean of the other samples' of its prompt; float32 (prompts, samples), as given.

    Unbiased, as no sample has a part in its own baseline (RLOO; Kool et al., 2019; arXiv 2402.14740).

    >>> leave_one_out(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-3.0000, -1.5000,  4.5000]])
    """
    samples = returns.shape[1]
    return (returns - returns.mean(1, keepdim=True)) * (samples / (samples - 1))


def group_scale(returns: Tensor) -> Tensor:
    """One over the standard deviation of a prompt's returns; float32 (prompts, 1).

    Group-normalised advantages (GRPO, arXiv 2402.03300) are centred returns times this scale.  Where a
    prompt's samples have all the same return it is 1, as they are zero in any case.

    >>> group_scale(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    tensor([[0.7071],
            [1.0000]])
    """
    deviation = returns.std(1, keepdim=True)
    return torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), torch.ones_like(deviation))


def generalised(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Schulman et al., 2016), and the returns that values are fitted to.

    With delta_t = r_t + discount V_{t+1} - V_t: A_t = sum_u (discount smoothing)^u delta_{t+u}.  All are
    float32 (responses, longest); ``mask`` is true for each token of a response, after which V is 0.

    >>> ones = torch.ones(1, 2)
    >>> generalised(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), ones.bool(), 1.0, 0.5)
    (tensor([[0.5000, 1.0000]]), tensor([[0.5000, 1.0000]]))
    """
    inside = mask.float()
    values = values * inside
    later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = (rewards + discount * later - values) * inside
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in range(deltas.shape[1] - 1, -1, -1):
        running = deltas[:, t] + discount * smoothing * running * inside[:, t]
        advantages[:, t] = running
    return advantages * inside, (advantages + values) * inside
