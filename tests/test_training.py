"""Training: rates, the loop, what is trained, and the laws that do not depend on how a step is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Config
from bfpo_exp.config.training import Optimisation, SeededOptimisation
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.padded import PaddedRows, response_logps
from bfpo_exp.logprobs.paths import SHARED
from bfpo_exp.logprobs.reference import reference_logps
from bfpo_exp.losses import LOSSES
from bfpo_exp.models.policy import select_trainable
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.train.demonstrations import DemonstrationObjective
from bfpo_exp.train.engine import PlainEngine, lr_factor
from bfpo_exp.train.loop import Sums, total_steps, train
from bfpo_exp.train.preference import PreferenceObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Log = list[tuple[int, dict[str, float]]]
OPTIMISATION: dict[str, Any] = {
    "trainable": "all",
    "steps": 10,
    "epochs": None,
    "batch": 16,
    "microbatch": 16,
    "lr": 1e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "betas": [0.9, 0.999],
    "clip": 1.0,
    "log_every": 1,
    "optimizer": "adamw",
    "gradient_checkpointing": False,
    "checkpoint_every": None,
    "keep_checkpoints": 1,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are quickest so, and the last bits of their numbers do not depend on the machine."""
    with cpu_threads(1):
        yield


def optimisation(**changes: Any) -> Optimisation:
    return Optimisation(**{**OPTIMISATION, **changes})


def seeded(**changes: Any) -> SeededOptimisation:
    return SeededOptimisation(**{**OPTIMISATION, "seed": 0, "threads": 1, **changes})


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [
        ("linear", [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", [1.0] * 8),
        # (1 + cos(k pi / 8)) / 2
        ("cosine", [1.0, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806]),
    ],
)
def test_rates_of_ten_steps_by_hand(schedule: str, after_warmup: list[float]) -> None:
    """Two steps of warm-up, at a half and the whole of the peak, then eight of the schedule."""
    values = optimisation(schedule=schedule, warmup=0.2)
    factors = [lr_factor(step, 10, values) for step in range(10)]
    assert factors == pytest.approx([0.5, 1.0, *after_warmup], abs=1e-6)


def test_a_warm_up_of_nothing_and_of_everything() -> None:
    assert lr_factor(0, 4, optimisation(schedule="linear")) == 1.0
    whole = optimisation(schedule="linear", warmup=1.0)
    assert [lr_factor(step, 4, whole) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_engine_steps_at_the_scheduled_rate() -> None:
    """AdamW's first step moves a weight by the rate, whatever the gradient's size."""
    module = nn.Linear(1, 1, bias=False)
    engine = PlainEngine(
        module, list(module.parameters()), optimisation(warmup=0.5, betas=[0.0, 0.0]), steps=4
    )
    moved = []
    for _ in range(4):
        before = module.weight.item()
        engine.backward(3.0 * module.weight.sum())
        assert engine.step().item() == pytest.approx(3.0)  # the norm before clipping
        moved.append(before - module.weight.item())
    assert moved == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3], rel=1e-3)


def test_gradients_are_clipped_to_the_norm() -> None:
    """betas = (0, 0) would hide the size of a gradient; the momentum of two steps shows it."""
    module = nn.Linear(2, 1, bias=False)
    engine = PlainEngine(module, list(module.parameters()), optimisation(clip=0.5), steps=2)
    engine.backward((module.weight * torch.tensor([[3.0, 4.0]])).sum())
    assert engine.step().item() == pytest.approx(5.0)
    moment = engine.optimiser.state[module.weight]["exp_avg"]  # (1 - 0.9) * gradient
    assert moment.flatten().tolist() == pytest.approx([0.1 * 0.3, 0.1 * 0.4], rel=1e-4)


# ---------------------------------------------------------------- the loop


class Counting:
    """An engine and an objective that only count: micro-batch values are the numbers 1, 2, 3, ..."""

    rows = 2

    def __init__(self) -> None:
        self.module: nn.Module = nn.Identity()
        self.device = torch.device("cpu")
        self.number = 0

    def microbatches(self, step: int) -> Iterator[int]:
        yield from (2 * step + 1, 2 * step + 2)

    def loss(self, model: nn.Module, batch: int) -> tuple[Tensor, Sums]:
        self.number = batch
        value = torch.tensor(float(batch))
        return value, Sums(means={"value": (value, torch.tensor(1))}, totals={"seen": torch.tensor(1)})

    def backward(self, loss: Tensor, last: bool) -> None:
        assert last == (self.number % 2 == 0)

    def step(self) -> Tensor:
        return torch.tensor(2.0)


def test_logs_come_after_the_first_step_every_few_and_the_last() -> None:
    """Steps see (1, 2), (3, 4), ...; a log has the means since the one before."""
    both = Counting()
    log: Log = []
    steps: list[int] = []
    train(both, both, 7, 3, lambda taken, values: log.append((taken, dict(values))), steps.append)
    assert [(taken, values["value"]) for taken, values in log] == [
        (1, 1.5),
        (3, 4.5),  # steps 2 and 3: 3 to 6
        (6, 9.5),  # 7 to 12
        (7, 13.5),
    ]
    assert [values["seen"] for _, values in log] == [2, 4, 6, 2]
    assert all(values["gradient_norm"] == 2.0 for _, values in log)
    assert sum(steps) == 7


def test_the_number_of_steps() -> None:
    assert total_steps(optimisation(steps=7), rows=1000) == 7
    assert total_steps(optimisation(steps=None, epochs=2), rows=100) == 13  # 200 / 16, rounded up
    assert total_steps(optimisation(steps=None, epochs=0.5), rows=64) == 2


def sums_of(value: float, count: int) -> Sums:
    return Sums({"mean": (torch.tensor(value), torch.tensor(count))}, {"total": torch.tensor(value)})


def test_sums_add_up_in_any_grouping() -> None:
    parts = [(3.0, 1), (5.0, 3), (0.0, 0), (7.0, 2)]
    one_by_one, left, right = Sums(), Sums(), Sums()
    for part in parts:
        one_by_one.add(sums_of(*part))
    for half, two in ((left, parts[:2]), (right, parts[2:])):
        for part in two:
            half.add(sums_of(*part))
    left.add(right)
    assert one_by_one.read() == left.read() == {"mean": 15 / 6, "total": 15.0}


def test_a_mean_over_nothing_is_left_out() -> None:
    assert sums_of(0.0, 0).read() == {"total": 0.0}


# ---------------------------------------------------------------- what is trained


def test_only_down_proj_changes(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    engine = PlainEngine(
        model, select_trainable(model, ["mlp.down_proj"]), optimisation(weight_decay=0.1), steps=1
    )
    logps, _ = response_logps(model, PaddedRows.of([[1, 5]], [[6, 2]]))
    engine.backward(-logps.sum())
    engine.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{block}.mlp.down_proj.weight" for block in (0, 1)}


def test_suffixes_are_whole_names_of_modules(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(tie_word_embeddings=False)
    assert len(select_trainable(model, ["q_proj", "layers.1.mlp.down_proj"])) == 3
    assert len(select_trainable(model, ["norm"])) == 1  # the last one, not every "...layernorm"
    assert len(select_trainable(model, ["layers.0"])) == 9  # 4 of attention, 3 of the MLP, 2 norms
    assert len(select_trainable(model, "all")) == len(list(model.parameters()))
    with pytest.raises(UserError, match=r"'mlp\.down_prj'.*nearest: 'mlp\.down_proj'"):
        select_trainable(model, ["mlp.down_prj"])
    with pytest.raises(UserError, match="'own_proj'"):
        select_trainable(model, ["own_proj"])


# ---------------------------------------------------------------- laws


def trained(
    model: PreTrainedModel, objective: Any, values: Optimisation, steps: int
) -> tuple[Log, dict[str, Tensor]]:
    """A copy of the model after some steps, with what was logged after each."""
    log: Log = []
    model = copy.deepcopy(model)
    engine = PlainEngine(model, select_trainable(model, values.trainable), values, steps)

    def on_log(taken: int, logged: Mapping[str, float]) -> None:
        log.append((taken, dict(logged)))

    train(engine, objective, steps, values.log_every, on_log)
    return log, model.state_dict()


def assert_same_training(
    start: Mapping[str, Tensor], one: tuple[Log, dict[str, Tensor]], other: tuple[Log, dict[str, Tensor]]
) -> None:
    for (_, expected), (_, values) in zip(one[0], other[0], strict=True):
        for name in expected.keys() - {"accuracy"}:  # the first step's h is 0 up to rounding, of any sign
            # Differences of log-probs of some -100 nats are known to 1e-3 or so in float32.
            absolute = 0.0 if name in ("loss", "gradient_norm") else 1e-3
            assert values[name] == pytest.approx(expected[name], rel=1e-4, abs=absolute), name
    for name, weight in one[1].items():
        # AdamW moves a weight whose gradient is about 0 by the rate in the direction of the noise, so
        # it is the weights together that agree: to 0.5% of the way that they went.
        apart, moved = (other[1][name] - weight).norm(), (weight - start[name]).norm()
        assert apart <= 5e-3 * moved, name
        assert apart <= 1e-4 * weight.norm(), name


@pytest.mark.parametrize("batches", ["balanced", "shuffle"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_microbatches_do_not_change_preference_training(
    loss: str,
    batches: str,
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    model, pairs = tiny_model(), random_pairs(40)
    logps, first = reference_logps(model, pairs, SHARED), reference_logps(tiny_model(seed=1), pairs, SHARED)
    runs = []
    for microbatch in (16, 8, 2, 1):
        run = preference_config(loss, train__microbatch=microbatch, data__batches=batches)
        objective = PreferenceObjective(pairs, logps, run, "cpu", first)
        runs.append(trained(model, objective, run.train, steps=3))
    losses = [values["loss"] for _, values in runs[0][0]]
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)  # the steps do something
    for run_in_parts in runs[1:]:
        assert_same_training(model.state_dict(), runs[0], run_in_parts)


def test_microbatches_do_not_change_training_on_demonstrations(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    """Responses of 1 to 60 tokens: a mean over micro-batches of means would be another number."""
    model, rng = tiny_model(), np.random.default_rng(0)
    lengths = [1, 60, 2, 3, 45, 1, 30, 2] * 4
    prompts = [[1, *rng.integers(3, 64, 4).tolist()] for _ in lengths]
    responses = [[*rng.integers(3, 64, length - 1).tolist(), 2] for length in lengths]
    runs = []
    for microbatch in (16, 8, 2, 1):
        values = seeded(microbatch=microbatch)
        objective = DemonstrationObjective(prompts, responses, values, "cpu")
        runs.append(trained(model, objective, values, steps=3))
    for run_in_parts in runs[1:]:
        assert_same_training(model.state_dict(), runs[0], run_in_parts)

    first = DemonstrationObjective(prompts, responses, seeded(), "cpu").batches[0]
    with torch.no_grad():
        rows = PaddedRows.of([prompts[i] for i in first], [responses[i] for i in first])
        sums, counts = response_logps(model, rows)
    of_all_tokens, of_responses = -sums.sum() / counts.sum(), -(sums / counts).mean()
    assert runs[0][0][0][1]["loss"] == pytest.approx(of_all_tokens.item(), rel=1e-5)
    assert of_responses.item() != pytest.approx(of_all_tokens.item(), rel=1e-2)


def test_the_same_seed_gives_the_same_metrics_bit_for_bit(
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    model, pairs = tiny_model(), random_pairs(40)
    logps = reference_logps(model, pairs, SHARED)

    def run(seed: int) -> tuple[Log, dict[str, Tensor]]:
        values = preference_config("bfpo", train__microbatch=8, seed=seed)
        return trained(model, PreferenceObjective(pairs, logps, values, "cpu"), values.train, steps=3)

    (log, weights), (again, weights_again), (other, _) = run(0), run(0), run(1)
    assert again == log
    assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())
    assert [v["loss"] for _, v in other] != [v["loss"] for _, v in log]


def test_the_first_loss_is_the_loss_at_the_reference(
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    """ln 2 for DPO; mean of (g / beta)^2 for BFPO.  With another model's log-probs it is not."""
    model, pairs = tiny_model(), random_pairs(40)
    logps = reference_logps(model, pairs, SHARED)
    dpo = preference_config("dpo")
    ((_, values),), _ = trained(model, PreferenceObjective(pairs, logps, dpo, "cpu"), dpo.train, steps=1)
    assert values["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert values["kl"] == pytest.approx(0, abs=1e-4)

    bfpo = preference_config("bfpo")
    objective = PreferenceObjective(pairs, logps, bfpo, "cpu")
    ((_, values),), _ = trained(model, objective, bfpo.train, steps=1)
    batch = objective.batches[0]
    g = 0.5 * (3 * pairs.safe_w[batch] - pairs.safe_l[batch]) - 0.5
    assert values["loss"] == pytest.approx(((g / 0.2) ** 2).mean(), rel=1e-4)
    assert values["loss_at_reference"] == pytest.approx(((g / 0.2) ** 2).mean(), rel=1e-6)

    of_another = reference_logps(tiny_model(seed=1), pairs, SHARED)
    objective = PreferenceObjective(pairs, of_another, bfpo, "cpu")
    ((_, values),), _ = trained(model, objective, bfpo.train, steps=1)
    assert values["loss"] != pytest.approx(values["loss_at_reference"], rel=0.01)
