"""Random problems on which helpfulness and safety are uncorrelated exactly, or by a known amount.

Every function draws from the generator it is given and returns float64 problems with one leading
batch dimension of ``count``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bfpo_exp.theory.bilinear import Problem
from bfpo_exp.theory.pairwise import preference_matrix

F64 = torch.float64


def levels_problem(
    count: int, levels: int, generator: torch.Generator, strength: float = 0.0, steepness: float = 2.0
) -> Problem:
    """Every level of helpfulness once as a safe and once as an unsafe action: n = 2 levels.

    Levels have random helpfulness x and random mass m.  Preferences are Bradley-Terry's,
    P = sigmoid(steepness (x - x')).  The safe action has the share (1 + strength) / 2 of the mass of a
    level in the more helpful half, (1 - strength) / 2 in the less helpful half, 1/2 in the middle.

    With strength 0 comparison and safety are independent under mu and the gap is zero; with a
    positive one the more helpful actions are safe more often, with a negative one less often.

    Args:
        count: how many problems.
        levels: L >= 2.
        generator: the source of randomness.
        strength: in (-1, 1).
        steepness: of the preferences; the larger, the closer to a strict ranking.
    """
    x = torch.randn(count, levels, generator=generator, dtype=F64).sort(-1).values
    mass = torch.rand(count, levels, generator=generator, dtype=F64) + 0.2
    half = torch.linspace(-1, 1, levels, dtype=F64).sign()
    safe_share = (1 + strength * half) / 2
    mu = torch.cat([mass * safe_share, mass * (1 - safe_share)], dim=-1)
    both = torch.cat([x, x], dim=-1)
    return Problem(
        mu=mu / mu.sum(-1, keepdim=True),
        preference=torch.sigmoid(steepness * (both[..., :, None] - both[..., None, :])),
        safety=torch.cat([torch.ones_like(x), torch.zeros_like(x)], dim=-1),
    )


def uncorrelated_problem(safety: Tensor, generator: torch.Generator, offset: float = 0.0) -> Problem:
    """A random problem among ALL with these labels whose gap is one number for all actions.

    With P = 1/2 + K, K skew-symmetric, and v = mu (s - E[s]) the gap is delta = K v.  It is zero
    exactly for K = Q A Q with A skew-symmetric and Q the projection off v; a constant c comes in by
    c (1 v^T - v 1^T) / |v|^2.  Preferences need be neither transitive nor near a ranking.

    Args:
        safety: (count, n), float64 labels or probabilities, or scores of several factors.
        generator: the source of randomness, for mu and for preferences.
        offset: in [-1, 1], how much of K makes the constant; without it the gap is zero.
    """
    mu = torch.rand(safety.shape, generator=generator, dtype=F64) + 0.2
    mu = mu / mu.sum(-1, keepdim=True)
    v = mu * (safety - (mu * safety).sum(-1, keepdim=True))
    unit = _to_unit(v, v.norm(dim=-1, keepdim=True))
    noise = torch.randn(*safety.shape, safety.shape[-1], generator=generator, dtype=F64)
    off = torch.eye(safety.shape[-1], dtype=F64) - unit[..., :, None] * unit[..., None, :]
    free, tilt = off @ (noise - noise.mT) @ off, v[..., None, :] - v[..., :, None]
    free, tilt = (_to_unit(m, m.abs().amax((-2, -1), keepdim=True)) for m in (free, tilt))
    k = (1 - abs(offset)) * free + offset * tilt
    return Problem(mu=mu, preference=0.5 + 0.5 * k, safety=safety)


def independent_ranking_problem(count: int, n: int, generator: torch.Generator) -> Problem:
    """n equally likely actions in a strict random ranking, each safe with probability 1/2 on its own.

    Safety does not depend on helpfulness in the population, yet on n actions it does by chance.
    """
    helpfulness = torch.rand(count, n, generator=generator, dtype=F64)
    return Problem(
        mu=torch.full((count, n), 1 / n, dtype=F64),
        preference=preference_matrix(helpfulness),
        safety=(torch.rand(count, n, generator=generator, dtype=F64) < 0.5).to(F64),
    )


def _to_unit(values: Tensor, size: Tensor) -> Tensor:
    return values / size.clamp_min(1e-12)  # of equal labels v is zero, and stays so
