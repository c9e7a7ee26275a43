"""Optimisers: first steps by hand, and AdamW as it always was."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Config
from bfpo_exp.config.training import Optimisation
from bfpo_exp.errors import UserError
from bfpo_exp.train.optimisers import check_optimiser, make_optimiser

WEIGHTS, GRADIENTS = [1.0, -2.0, 0.5], [[0.3, -4.0, 1e-3], [-0.1, 2.0, 1e-3], [0.2, 0.2, 0.2]]


@pytest.fixture
def optimisation(config: Callable[..., Config]) -> Callable[..., Optimisation]:
    """The preference stage's settings with changes."""

    def changed(**changes: object) -> Optimisation:
        values = config().train.base.model_dump(exclude={"seed", "threads"})
        return Optimisation(**{**values, "lr": 0.01, "betas": (0.9, 0.75), **changes})

    return changed


def stepped(settings: Optimisation) -> list[list[float]]:
    """The weights after each of three steps along fixed gradients."""
    weight = nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64))
    optimiser = make_optimiser([weight], settings)
    path = []
    for gradient in GRADIENTS:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimiser.step()
        path.append(weight.tolist())
    return path


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_by_its_formula(decay: float, optimisation: Callable[..., Optimisation]) -> None:
    """m and v corrected for their start at 0; decay shrinks the weight and not the gradient."""
    expected, m, v = [], [0.0] * 3, [0.0] * 3
    weights = list(WEIGHTS)
    for t, gradient in enumerate(GRADIENTS, start=1):
        for i, g in enumerate(gradient):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.75 * v[i] + 0.25 * g * g
            direction = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.75**t)) ** 0.5 + 1e-8)
            weights[i] = weights[i] * (1 - 0.01 * decay) - 0.01 * direction
        expected.append(list(weights))
    for step, by_hand in zip(stepped(optimisation(weight_decay=decay)), expected, strict=True):
        assert step == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rmsprop_by_its_formula(decay: float, optimisation: Callable[..., Optimisation]) -> None:
    """The second of the betas smooths, the first plays no part; decay is added to the gradient."""
    expected, v = [], [0.0] * 3
    weights = list(WEIGHTS)
    for gradient in GRADIENTS:
        for i, g in enumerate(gradient):
            g = g + decay * weights[i]
            v[i] = 0.75 * v[i] + 0.25 * g * g
            weights[i] -= 0.01 * g / (v[i] ** 0.5 + 1e-8)
        expected.append(list(weights))
    path = stepped(optimisation(optimizer="rmsprop", weight_decay=decay))
    for step, by_hand in zip(path, expected, strict=True):
        assert step == pytest.approx(by_hand, rel=1e-9)
    other = optimisation(optimizer="rmsprop", weight_decay=decay, betas=(0.1, 0.75))
    assert stepped(other) == path


def test_adamw_is_torchs_fused_one_bit_for_bit(optimisation: Callable[..., Optimisation]) -> None:
    def path(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(7, 5, generator=generator)) for _ in range(3)]
        optimiser = make(weights)
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.randn(7, 5, generator=generator)
            optimiser.step()
        return torch.stack([weight.detach() for weight in weights])

    settings = optimisation(weight_decay=0.1, betas=(0.9, 0.999))
    ours = path(lambda weights: make_optimiser(weights, settings))
    torchs = path(
        lambda weights: torch.optim.AdamW(weights, lr=0.01, betas=(0.9, 0.999), weight_decay=0.1, fused=True)
    )
    assert torch.equal(ours, torchs)


def test_an_optimiser_that_cannot_run_here_is_refused_in_one_line(
    optimisation: Callable[..., Optimisation],
) -> None:
    check_optimiser(optimisation())
    check_optimiser(optimisation(optimizer="rmsprop"))
    settings = optimisation(optimizer="adamw_8bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match=r"optimizer=adamw_8bit .*pip install bitsandbytes"):
            make_optimiser([nn.Parameter(torch.zeros(2))], settings)
    elif not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a GPU"):
            make_optimiser([nn.Parameter(torch.zeros(2))], settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="8-bit moments need a CUDA device")
def test_8_bit_moments_step_about_as_32_bit_ones(optimisation: Callable[..., Optimisation]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    ends = []
    for name in ("adamw", "adamw_8bit"):
        generator = torch.Generator("cuda").manual_seed(0)
        weight = nn.Parameter(torch.randn(128, 128, device="cuda", generator=generator))
        target = torch.randn(128, 128, device="cuda", generator=generator)
        optimiser = make_optimiser([weight], optimisation(optimizer=name, betas=(0.9, 0.999)))
        for _ in range(50):
            optimiser.zero_grad()
            ((weight - target) ** 2).sum().backward()
            optimiser.step()
        ends.append(weight.detach())
        state = [value for value in optimiser.state[weight].values() if isinstance(value, Tensor)]
        moments = [value for value in state if value.numel() == weight.numel()]
        assert [value.element_size() for value in moments] == [4 if name == "adamw" else 1] * 2
    assert (ends[1] - ends[0]).norm() <= 0.05 * ends[0].norm()
