"""Law: a live reference == the cached one == a second model, whatever the policy becomes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Config
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.paths import SHARED, Rows
from bfpo_exp.logprobs.reference import PairLogps, reference_logps
from bfpo_exp.losses import LOSSES
from bfpo_exp.models.policy import select_trainable
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.train.engine import PlainEngine
from bfpo_exp.train.live_reference import LiveReference, Reference, live_reference
from bfpo_exp.train.loop import train
from bfpo_exp.train.preference import PreferenceObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The last bits of numbers do not depend on the machine."""
    with cpu_threads(1):
        yield


class SecondModel:
    """The plainest reference: another copy of the whole model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy.deepcopy(model)

    @torch.no_grad()
    def logps(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return SHARED.logps(self.model, rows)


def rows_of(pairs: TokenisedPairs) -> Rows:
    return SHARED.rows(pairs.prompt_ids, list(zip(pairs.w_ids, pairs.l_ids, strict=True)), "cpu")


def live(model: PreTrainedModel) -> Reference:
    return live_reference(model, SHARED)


def trained(
    model: PreTrainedModel,
    pairs: TokenisedPairs,
    reference: Callable[[PreTrainedModel], PairLogps | Reference],
    run: Config,
    first: PairLogps,
) -> tuple[list[dict[str, float]], Reference | PairLogps, PreTrainedModel]:
    """What each step logs, for a reference of the model that is then trained; both at the end."""
    model, log = copy.deepcopy(model), []
    parameters = select_trainable(model, run.train.trainable)
    held = reference(model)
    engine = PlainEngine(model, parameters, run.train, STEPS)
    objective = PreferenceObjective(pairs, held, run, "cpu", first)

    def on_log(taken: int, values: Mapping[str, float]) -> None:
        log.append(dict(values))

    train(engine, objective, STEPS, 1, on_log)
    return log, held, model


@pytest.mark.parametrize("trainable", ["all", ["mlp.down_proj"]], ids=["all", "down_proj"])
@pytest.mark.parametrize("tied", [True, False])
def test_its_log_probs_stay_those_of_the_start(
    tied: bool,
    trainable: Any,
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    model, pairs = tiny_model(tie_word_embeddings=tied), random_pairs(24)
    rows, cached = rows_of(pairs), reference_logps(model, pairs, SHARED)
    expected = torch.from_numpy(np.stack([cached.w_sum, cached.l_sum], 1)).view(-1)
    run = preference_config("bfpo", train__trainable=trainable)
    _, held, policy = trained(model, pairs, live, run, cached)
    assert isinstance(held, LiveReference)
    before = copy.deepcopy(policy.state_dict())
    sums, counts = held.logps(rows)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=0)
    assert counts.tolist() == [
        len(ids) for both in zip(pairs.w_ids, pairs.l_ids, strict=True) for ids in both
    ]
    torch.testing.assert_close(sums, SecondModel(model).logps(rows)[0], rtol=1e-6, atol=0)
    # The policy has moved on, and is left as it is: its weights, and that it has no gradients.
    with torch.no_grad():
        moved, _ = SHARED.logps(policy, rows)
    assert ((moved - expected) / expected).abs().max() > 1e-3
    assert not sums.requires_grad
    assert all(parameter.grad is None for parameter in policy.parameters())
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_training_is_the_same_with_a_cached_a_live_and_a_second_reference(
    loss: str,
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    """Micro-batches of 4, so that means over a step (KTO) take their own pass; MODPO has its margin."""
    model, pairs = tiny_model(), random_pairs(40)
    first = reference_logps(tiny_model(seed=1), pairs, SHARED)
    changes: dict[str, Any] = {"train__trainable": ["mlp.down_proj"], "train__microbatch": 4}
    for logps in ("sum", "mean"):
        run = preference_config(loss, loss__logps=logps, **changes)
        kinds: list[Callable[[PreTrainedModel], PairLogps | Reference]] = [
            lambda model: reference_logps(model, pairs, SHARED),
            live,
            SecondModel,
        ]
        of_cached, of_live, of_second = (trained(model, pairs, kind, run, first)[0] for kind in kinds)
        assert of_cached[0]["loss"] != pytest.approx(
            of_cached[-1]["loss"], rel=1e-3
        )  # the steps do something
        for expected, values, others in zip(of_cached, of_live, of_second, strict=True):
            assert values["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert values["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
            assert values["kl"] == pytest.approx(expected["kl"], rel=1e-4, abs=1e-3)
            assert others["loss"] == pytest.approx(values["loss"], rel=1e-6)
        assert of_live[0]["kl"] == 0.0  # bit for bit: the same batch through the same weights


def test_frozen_weights_are_shared_and_trained_ones_copied(
    tiny_model: Callable[..., PreTrainedModel], random_pairs: Callable[..., TokenisedPairs]
) -> None:
    model, rows = tiny_model(), rows_of(random_pairs(8))
    select_trainable(model, ["mlp.down_proj"])
    held = live_reference(model, SHARED)
    start, _ = held.logps(rows)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(1.5)
    assert torch.equal(held.logps(rows)[0], start)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.5)
    assert not torch.allclose(held.logps(rows)[0], start)


def test_weights_that_no_process_has_whole_are_refused(config: Callable[..., Config]) -> None:
    """Under ZeRO 3 a parameter is empty outside of its own forward pass; adapters are only switched off."""
    with pytest.raises(UserError, match="deepspeed=zero3 does not keep"):
        config("train.reference=live", "deepspeed=zero3")
    config("train.reference=cached", "deepspeed=zero3")
    config("train.reference=live", "deepspeed=zero2")
    config("train.reference=live", "deepspeed=none")
    config("train=lora", "train.reference=live", "deepspeed=zero3")


def test_a_reference_is_a_setting_of_the_preference_stage(config: Callable[..., Config]) -> None:
    assert config().train.reference == "cached"
    assert config("train.reference=live").train.reference == "live"
    with pytest.raises(UserError, match=r"train\.reference='alive' is not allowed; allowed: 'cached' or"):
        config("train.reference=alive")


def test_a_module_that_is_no_model_has_no_adapters() -> None:
    assert isinstance(live_reference(nn.Linear(2, 2), SHARED), LiveReference)
