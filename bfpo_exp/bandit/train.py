"""Training every setting and every repeat of the bandit as one batched computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bfpo_exp.bandit.problem import pairs
from bfpo_exp.bandit.results import BanditResult
from bfpo_exp.bandit.settings import BanditSettings, Point
from bfpo_exp.losses import bfpo_loss, dpo_loss, ipo_loss
from bfpo_exp.runtime import cpu_threads

LOSSES: dict[str, Callable[..., Tensor]] = {"bfpo": bfpo_loss, "dpo": dpo_loss, "ipo": ipo_loss}
RECORDS = 100  # points of a learning curve, about


@cpu_threads(1)  # tensors this small only wait for one another's threads
def run_bandit(settings: BanditSettings) -> BanditResult:
    """Train the policies softmax(theta) of all settings and repeats.

    theta has shape (settings, repeats, n) in float64 and starts at 0; the reference is uniform.
    The loss of a policy is the mean of its method's loss over the batch.  Adam works element by
    element, so one optimiser on all of theta takes the steps that one a policy would take.
    """
    n, points = len(settings.safe), settings.points
    winners, losers = torch.tensor(pairs(settings.helpfulness)).T - 1
    safe = torch.tensor(settings.safe, dtype=torch.float64)
    reference = torch.full((len(winners),), -math.log(n), dtype=torch.float64)
    data = {"ref_w": reference, "ref_l": reference}
    labels = {"safe_w": safe[winners], "safe_l": safe[losers]}
    weights = pair_weights(settings)
    every = math.ceil(settings.steps / RECORDS)

    theta = torch.zeros(len(points), settings.repeats, n, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([theta], lr=settings.lr)
    groups = [_group(method, points) for method in settings.methods]
    steps, curves = [], []
    for step in range(settings.steps + 1):
        log_pi = theta.log_softmax(-1)
        if step % every == 0 or step == settings.steps:
            steps.append(step)
            curves.append(log_pi.detach())
        if step == settings.steps:
            break
        policy_w, policy_l = log_pi[..., winners], log_pi[..., losers]
        losses = [
            LOSSES[method](
                policy_w=policy_w[rows],
                policy_l=policy_l[rows],
                **data,
                **(labels if "b1" in hyperparameters else {}),
                **hyperparameters,
            )
            for method, rows, hyperparameters in groups
        ]
        adam.zero_grad()
        (torch.cat(losses) * weights[step]).sum().backward()
        adam.step()
    return BanditResult(settings, tuple(steps), torch.stack(curves))


def pair_weights(settings: BanditSettings) -> Tensor:
    """The share of each pair in the batch of each step and repeat, float64 of shape (steps, repeats, pairs).

    Pairs drawn with replacement enter the mean over the batch by how often they were drawn.  The
    draws are a function of (seed, repeat): all settings of a repeat see the same batches, and no
    setting or repeat changes the numbers of another.
    """
    count = len(pairs(settings.helpfulness))
    if settings.batch is None:
        return torch.tensor(1 / count, dtype=torch.float64).expand(settings.steps, settings.repeats, count)
    weights = torch.zeros(settings.steps, settings.repeats, count, dtype=torch.float64)
    share = torch.tensor(1 / settings.batch, dtype=torch.float64).expand(settings.steps, settings.batch)
    for repeat in range(settings.repeats):
        draws = np.random.default_rng([settings.seed, repeat]).integers(count, size=share.shape)
        weights[:, repeat].scatter_add_(1, torch.from_numpy(draws), share)
    return weights


def _group(method: str, points: tuple[Point, ...]) -> tuple[str, slice, dict[str, Tensor]]:
    """A method, its rows among the settings, and its hyper-parameters, each of shape (rows, 1, 1)."""
    rows = [row for row, point in enumerate(points) if point.method == method]
    columns = zip(*(points[row][1:] for row in rows), strict=True)
    hyperparameters = {
        name: torch.tensor(column, dtype=torch.float64).reshape(-1, 1, 1)
        for name, column in zip(("beta", "alpha", "b1"), columns, strict=True)
        if None not in column
    }
    return method, slice(rows[0], rows[-1] + 1), hyperparameters
