"""Float32 master weights: what bfloat16 alone loses, and what they must leave as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Config
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.logprobs.paths import SHARED
from bfpo_exp.logprobs.reference import reference_logps
from bfpo_exp.models.policy import select_trainable
from bfpo_exp.train.masters import MasterWeights
from bfpo_exp.train.preference import PreferenceObjective

STEPS, RATE = 400, 1e-4


def descended(weight: nn.Parameter, masters: bool) -> Tensor:
    """The weight after `STEPS` steps of `RATE` along a gradient of 1."""
    held = MasterWeights([weight]) if masters else None
    optimiser = torch.optim.SGD(held.parameters if held else [weight], lr=RATE)
    for _ in range(STEPS):
        weight.sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        if held:
            held.write_back()
    return weight.detach()


def test_updates_too_small_for_bfloat16_add_up() -> None:
    """1 - 400 * 1e-4 = 0.96; a step is a twentieth of what bfloat16 tells apart there (2^-9 below 1)."""
    start = torch.tensor([1.0, -1.0, 0.5, 3.0], dtype=torch.bfloat16)
    alone = descended(nn.Parameter(start.clone()), masters=False)
    assert torch.equal(alone, start)
    kept = descended(nn.Parameter(start.clone()), masters=True)
    assert kept.dtype == torch.bfloat16
    expected = (start.double() - STEPS * RATE).to(torch.bfloat16)
    assert torch.equal(kept, expected)


def test_gradients_are_summed_in_float32_and_freed() -> None:
    """In bfloat16, 256 + 1 = 256: sixteen ones after a 256 would all be lost."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    masters = MasterWeights([weight])
    for factor in [256.0] + [1.0] * 16:
        (weight * factor).sum().backward()
        assert weight.grad is None
    (master,) = masters.parameters
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert master.grad.tolist() == [272.0] * 3

    plain = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    for factor in [256.0] + [1.0] * 16:
        (plain * factor).sum().backward()
    assert plain.grad is not None
    assert plain.grad.tolist() == [256.0] * 3


def test_float32_parameters_stand_for_themselves() -> None:
    weights = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2, 3))]
    before = [weight.detach().clone() for weight in weights]
    masters = MasterWeights(weights)
    assert all(own is given for own, given in zip(masters.parameters, weights, strict=True))
    assert masters.state_tensors() == {}
    masters.load_state_tensors({})
    masters.write_back()
    (weights[0] ** 2).sum().backward()
    assert weights[0].grad is not None
    assert torch.equal(weights[0].grad, 2 * before[0])
    for weight, start in zip(weights, before, strict=True):
        assert torch.equal(weight, start)


def test_a_mixture_keeps_its_order() -> None:
    low, high = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))
    masters = MasterWeights([low, high])
    assert [tuple(parameter.shape) for parameter in masters.parameters] == [(2,), (3,)]
    assert masters.parameters[1] is high
    assert list(masters.state_tensors()) == ["0"]


def test_a_checkpoint_keeps_the_bits_that_the_model_has_not() -> None:
    start = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    one = nn.Parameter(start.clone())
    masters = MasterWeights([one])
    with torch.no_grad():
        masters.parameters[0].sub_(1e-4)
    masters.write_back()
    assert torch.equal(one, start)  # not yet to be seen
    saved = {name: tensor.clone() for name, tensor in masters.state_tensors().items()}

    other = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    restored = MasterWeights([other])
    restored.load_state_tensors(saved)
    assert torch.equal(restored.parameters[0], masters.parameters[0])
    assert torch.equal(other, start)
    with pytest.raises(ValueError, match="master weights"):
        MasterWeights([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]).load_state_tensors(saved)
    with pytest.raises(ValueError, match="master weights"):
        restored.load_state_tensors({})


def test_eight_micro_batches_of_one_and_one_of_eight(
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., nn.Module],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    """The gradients of a bfloat16 model: as near to each other as its log-probs are known."""
    pairs = random_pairs(8)
    logps = reference_logps(tiny_model(seed=1), pairs, SHARED)  # type: ignore[arg-type]
    sums = {}
    for microbatch in (8, 1):
        model = tiny_model(dtype=torch.bfloat16)
        trained = select_trainable(model, ["mlp.down_proj"])
        masters = MasterWeights(trained)
        run = preference_config("dpo", train__batch=8, train__microbatch=microbatch)
        objective = PreferenceObjective(pairs, logps, run, "cpu")
        for batch in objective.microbatches(0):
            objective.loss(model, batch)[0].backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        gradients = [master.grad for master in masters.parameters if master.grad is not None]
        assert len(gradients) == len(trained)
        sums[microbatch] = torch.cat([gradient.flatten() for gradient in gradients])
    assert sums[1].dtype == torch.float32
    assert (sums[1] - sums[8]).norm() <= 0.02 * sums[8].norm()
