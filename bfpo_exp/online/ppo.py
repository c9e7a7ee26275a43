"""The loss of Proximal Policy Optimisation on tokens, and estimates of the KL divergence.

Everything here is a pure function of tensors over the T tokens of all responses, laid end to end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clipped(logps: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Per token -min(rho A, clip(rho, 1 - c, 1 + c) A) with rho = pi / pi_old; and which tokens are clipped.

    Log-probs in nats and advantages are float32 (T,); returns float32 (T,) and bool (T,) (Schulman et al.,
    2017, arXiv 1707.06347, eq. 7).  At pi = pi_old the gradient is that of -A log pi.
    """
    ratio = (logps - old).exp()
    held = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(ratio * advantages, held * advantages)
    return loss, (held * advantages < ratio * advantages).detach()


def k1(logps: Tensor, reference: Tensor) -> Tensor:
    """log pi - log ref of sampled tokens, whose mean under pi is KL(pi || ref) of the next token; (T,)."""
    return logps - reference


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """r - 1 - log r with r = ref / pi: the same mean under pi, never negative, of less variance; (T,).

    After J. Schulman, *Approximating KL Divergence* (2020).  Its own gradient alone is that of
    KL(ref || pi), not of the divergence that it estimates; `online.objective` adds what is missing.

    >>> k3(torch.tensor([0.0, -1.0]), torch.tensor([0.0, -2.0]))
    tensor([0.0000, 0.3679])
    """
    return torch.expm1(reference - logps) - (reference - logps)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Per token half the squared error of the value head, which may move by ``clip``; float32 (T,)."""
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(F.mse_loss(values, returns, reduction="none"), (held - returns) ** 2)
