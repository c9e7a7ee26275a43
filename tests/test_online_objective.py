"""The objective of ``loss=morl`` on a tiny model with made rewards: gradients, cuts, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model_support import END_OF_TURN, made_model

from bfpo_exp.config.rewards import Lagrangian, Linear, MaxMin
from bfpo_exp.config.schema import Config
from bfpo_exp.logprobs.paths import PADDED, SHARED
from bfpo_exp.online.objective import OnlineObjective
from bfpo_exp.online.rollout import Prompts, Rollout
from bfpo_exp.online.sampler import RolloutSampler
from bfpo_exp.online.settings import Morl
from bfpo_exp.online.value import add_value_head, without_value_head
from bfpo_exp.stages.online import SamplesFile, steered
from bfpo_exp.train.checkpoints import Checkpoints
from bfpo_exp.train.engine import PlainEngine
from bfpo_exp.train.live_reference import live_reference
from bfpo_exp.train.loop import train

LINEAR = Linear.model_validate({"rule": "linear", "weights": {"helpfulness": 0.5, "safety": 0.5}})
Settings = Callable[..., Config]


class Chat:
    """What the sampler asks of a chat format: texts are the ids, written out."""

    end_of_turn_id = END_OF_TURN

    class tokenizer:
        pad_token_id = 0

        @staticmethod
        def pad(rows: dict[str, list[list[int]]], padding_side: str, return_tensors: str) -> dict[str, Any]:
            longest = max(map(len, rows["input_ids"]))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows["input_ids"]])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows["input_ids"]])
            return {"input_ids": ids, "attention_mask": mask}

    @staticmethod
    def text(ids: list[int]) -> str:
        return " ".join(str(i) for i in ids if i != END_OF_TURN)


def scorer(prompts: list[Any], texts: list[str]) -> dict[str, np.ndarray]:
    """Rewards from the words: the share of even ones, and of small ones."""
    words = [[int(word) for word in text.split()] or [1] for text in texts]
    return {
        "helpfulness": np.array([np.mean([w % 2 == 0 for w in row]) for row in words]),
        "safety": np.array([np.mean([w < 32 for w in row]) for row in words]),
    }


@pytest.fixture(scope="session")
def settings(config: Callable[..., Config]) -> Settings:
    def changed(**changes: Any) -> Config:
        values = config("loss=morl").model_dump()
        values["train"] |= {"trainable": "all", "batch": 4, "microbatch": 4, "lr": 1e-2, "log_every": 1}
        values["train"] |= {"steps": 8, "warmup": 0.0}
        values["loss"] |= {"max_new_tokens": 8, "samples": 3, "incomplete": None}
        for key, value in changes.items():
            values["train" if key in values["train"] else "loss"][key] = value
        return Config.model_validate(values)

    return changed


def made_prompts(n: int = 24) -> Prompts:
    rng = np.random.default_rng(0)
    ids = [[1, *rng.integers(3, 64, rng.integers(1, 9)).tolist()] for _ in range(n)]
    return Prompts(
        [[{"role": "user", "content": str(row)}] for row in ids], ids, (np.arange(n) % 2).astype(np.int8)
    )


def made_objective(
    model: Any,
    config: Config,
    path: Any = SHARED,
    keep: Callable[..., None] = lambda *_: None,
    rule: Any = LINEAR,
) -> OnlineObjective:
    prompts, reference = made_prompts(), live_reference(model, path)
    if config.loss.hyperparameters["advantages"] == "value":
        add_value_head(model)
    sampler = RolloutSampler(model, reference, prompts, scorer, rule, Chat(), path, config, keep)  # type: ignore[arg-type]
    own = Morl.model_validate(config.loss.hyperparameters)
    multiplier = rule.multiplier if isinstance(rule, Lagrangian) else None
    objective = OnlineObjective(
        prompts, reference, sampler, lambda rollout: steered(rollout, own, rule), multiplier, config, "cpu"
    )
    objective.path = path
    return objective


def gradients(model: Any, objective: OnlineObjective, step: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in objective.microbatches(step):
        objective.loss(model, batch)[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_first_step_is_the_policy_gradient(settings: Settings) -> None:
    """By hand: the mean over responses of -(R_i - mean of the others) grad log pi(y_i)."""
    model = made_model()
    objective = made_objective(model, settings(beta=0.3))
    found = gradients(model, objective)
    rollout = objective.rollout
    assert rollout is not None
    k, total = rollout.samples, torch.tensor(0.0)
    for i in range(4):
        prompt = objective.prompts.ids[rollout.prompts[i]]
        responses = rollout.responses[i * k : (i + 1) * k]
        logps, _ = PADDED.logps(model, PADDED.rows([prompt], [responses], "cpu"))
        returns = torch.tensor([rollout.reward[i * k + j] for j in range(k)])
        advantages = torch.stack([returns[j] - (returns.sum() - returns[j]) / (k - 1) for j in range(k)])
        total = total - (advantages * logps).sum() / (4 * k)
    model.zero_grad()
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert max(g.abs().max() for g in found.values()) > 1e-3


@pytest.mark.parametrize("logps", ["sum", "mean"])
@pytest.mark.parametrize("advantages", ["leave_one_out", "group_normalised", "value"])
def test_how_a_step_is_cut_changes_no_gradient(settings: Settings, advantages: str, logps: str) -> None:
    expected = None
    for microbatch in (4, 3, 1):
        model = made_model()
        config = settings(microbatch=microbatch, advantages=advantages, logps=logps)
        objective = made_objective(model, config)
        gradients(model, objective)
        with torch.no_grad():  # away from the policy that sampled, so that everything has a gradient
            for parameter in model.parameters():
                parameter.add_(
                    0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
        found = gradients(model, objective, step=1)
        expected = expected or found
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl", ["k1", "k3", "exact"])
def test_both_paths_to_log_probs_give_the_same_step(settings: Settings, kl: str) -> None:
    found = []
    for path in (SHARED, PADDED):
        model = made_model()
        objective = made_objective(model, settings(kl=kl, beta=0.5), path)
        gradients(model, objective)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
        found.append(gradients(model, objective, step=1))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=2e-3, atol=2e-5)


def test_policy_and_reference_are_the_same_at_first(settings: Settings) -> None:
    objective = made_objective(made_model(), settings())
    next(objective.microbatches(0))
    assert objective.rollout is not None
    assert np.abs(objective.rollout.kl).max() < 1e-5


@pytest.mark.parametrize("advantages", ["leave_one_out", "value"])
def test_a_continued_run_ends_bit_for_bit_where_a_whole_one_does(
    settings: Settings, tmp_path: Path, advantages: str
) -> None:
    """Cut in the middle of a rollout, whose policy is gone when the run goes on."""
    config = settings(advantages=advantages, kl_target=0.5)
    rule = Lagrangian(rule="lagrangian", limit=0.1, multiplier=1.0, rate=0.5, normalised=True)

    class Cut(Exception):
        pass

    def run(folder: str, die_after: int | None = None) -> tuple[dict[str, torch.Tensor], Any]:
        model, taken = made_model(), 0
        objective = made_objective(model, config, rule=rule)
        engine = PlainEngine(model, list(model.parameters()), config.train, 8)

        def progress(steps: int) -> None:
            nonlocal taken
            taken += steps
            if die_after is not None and taken > die_after:
                raise Cut

        checkpoints = Checkpoints(tmp_path / folder, every=3, keep=2, identity="online")
        train(engine, objective, 8, 1, lambda *_: None, progress, checkpoints)
        return dict(model.state_dict()), objective

    whole, of_whole = run("whole")
    with pytest.raises(Cut):
        run("cut", die_after=3)
    rest, of_rest = run("cut")
    assert all(torch.equal(rest[name], tensor) for name, tensor in whole.items())
    assert of_rest.rollout == of_whole.rollout
    assert of_rest.controls == of_whole.controls != (config.loss.hyperparameters["beta"], 1.0)


def test_training_raises_the_reward(settings: Settings) -> None:
    model, seen = made_model(), []
    config = settings(steps=60, beta=0.0, batch=8, microbatch=8, samples=4)
    objective = made_objective(model, config)
    engine = PlainEngine(model, list(model.parameters()), config.train, 60)
    train(engine, objective, 60, 4, lambda taken, values: seen.append(values["reward"]))
    assert np.mean(seen[-3:]) > np.mean(seen[:3]) + 0.15


def test_the_worse_of_two_rewards_is_raised(settings: Settings) -> None:
    model, seen = made_model(), []
    config = settings(steps=60, beta=0.0, batch=8, microbatch=8, samples=4)
    objective = made_objective(model, config, rule=MaxMin(rule="max_min"))
    engine = PlainEngine(model, list(model.parameters()), config.train, 60)
    train(engine, objective, 60, 4, lambda taken, values: seen.append(dict(values)))
    worse = [min(values["reward_helpfulness"], values["reward_safety"]) for values in (seen[0], seen[-1])]
    assert worse[1] > worse[0] + 0.1


def test_incomplete_responses_get_the_reward_that_is_set(settings: Settings) -> None:
    kept: list[tuple[Rollout, list[str]]] = []
    model = made_model()
    config = settings(incomplete=0.125, max_new_tokens=3)
    objective = made_objective(model, config, keep=lambda *both: kept.append(both))
    next(objective.microbatches(0))
    ((rollout, texts),) = kept
    cut = [
        response[-1] != END_OF_TURN or not text
        for response, text in zip(rollout.responses, texts, strict=True)
    ]
    assert any(cut)
    for name in ("helpfulness", "safety"):
        values = np.array(rollout.rewards[name])
        assert (values[cut] == 0.125).all()


def test_a_value_head_is_no_part_of_what_is_saved() -> None:
    model = made_model()
    names = set(model.state_dict())
    add_value_head(model)
    weights = without_value_head(model, dict(model.state_dict()))
    assert set(weights) == names == set(model.state_dict())


def test_samples_that_a_continued_run_draws_again_are_written_once(tmp_path: Path) -> None:
    prompts = made_prompts(2)

    def rollout(number: int) -> Any:
        rewards = {"helpfulness": [0.0], "safety": [1.0]}
        return SimpleNamespace(
            number=number, samples=1, prompts=[0], rewards=rewards, reward=[0.5], kl=np.array([0.25])
        )

    for numbers in ([0, 1], [1, 2]):
        file = SamplesFile(tmp_path / "samples.jsonl", prompts)
        for number in numbers:
            file.append(rollout(number), [f"text {number}"])
        with file.file.open("a") as out:
            out.write('{"half a li')
    lines = file.file.read_text().splitlines()
    assert len(lines) == 4
    assert [f'"rollout": {number}' in line for number, line in enumerate(lines[:3])] == [True] * 3


def test_copies_of_an_objective_sample_alike(settings: Settings) -> None:
    model = made_model()
    one, other = (made_objective(copy.deepcopy(model), settings()) for _ in range(2))
    next(one.microbatches(0)), next(other.microbatches(0))
    assert one.rollout == other.rollout
