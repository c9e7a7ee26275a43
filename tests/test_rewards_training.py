"""The reward model's objective by hand, what it does not depend on, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model_support import END_OF_TURN, VOCABULARY, made_model, made_pairs
from torch import Tensor, nn

from bfpo_exp.config.schema import Config
from bfpo_exp.config.training import RewardOptimisation
from bfpo_exp.data.draw import is_held_out
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.data.records import Message
from bfpo_exp.rewards.quality import Reliability, auc, heads_of, measured
from bfpo_exp.rewards.training import RewardObjective, new_reward_model, output_layer, select_trained
from bfpo_exp.stages.reward import SPLIT

LN2 = float(np.log(2))


@pytest.fixture(scope="module")
def optimisation(config: Callable[..., Config]) -> RewardOptimisation:
    return config(
        "train.reward.batch=8", "train.reward.microbatch=8", "train.reward.lr=1e-3", "train.reward.threads=1"
    ).train.reward


class Given(nn.Module):
    """Outputs that are told: of a sequence whose last token is t, (t, -t)."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        last = input_ids.gather(1, attention_mask.sum(1, keepdim=True) - 1)[:, 0].float()
        return SimpleNamespace(logits=torch.stack([last, -last], 1).requires_grad_())


def pairs_of(*rows: tuple[int, int, bool, float, float]) -> TokenisedPairs:
    """Pairs of one token each: the response's logits, whether they are ordered, and the labels."""
    w, l, ordered, safe_w, safe_l = zip(*rows, strict=True)  # noqa: E741
    return TokenisedPairs(
        prompt_ids=[[1, 5] for _ in rows],
        w_ids=[[token] for token in w],
        l_ids=[[7, token] for token in l],
        safe_w=np.array(safe_w, np.float32),
        safe_l=np.array(safe_l, np.float32),
        safer=np.zeros(len(rows), np.int8),
        ordered=np.array(ordered),
        stream=np.ones(len(rows), np.int8),
    )


def test_the_loss_by_hand(optimisation: RewardOptimisation) -> None:
    """Margins 2 and -1 are ordered; labels are known of 4, 3 and 2, whose safety logits are -4, -3 and -2."""
    nan = float("nan")
    pairs = pairs_of((4, 2, True, 1.0, nan), (3, 4, True, 0.0, nan), (9, 2, False, nan, 0.25))
    objective = RewardObjective(
        pairs, np.ones(3, bool), optimisation.model_copy(update={"batch": 3}), 0, "cpu"
    )
    (batch,) = objective.microbatches(0)
    loss, sums = objective.loss(Given(), batch)

    def softplus(x: float) -> float:
        return float(np.log1p(np.exp(x)))

    by_order = (softplus(-2) + softplus(1)) / 2
    # -(s log p + (1 - s) log (1 - p)) = softplus(x) - s x
    by_label = (softplus(-4) + 4 * 1.0 + softplus(-3) + softplus(-2) + 2 * 0.25) / 3
    assert loss.item() == pytest.approx(by_order + by_label, rel=1e-6)
    assert sums.read() == pytest.approx({"helpfulness_loss": by_order, "safety_loss": by_label}, rel=1e-6)


def test_pairs_that_say_nothing_are_in_no_batch(optimisation: RewardOptimisation) -> None:
    nan = float("nan")
    rows = [(4, 2, False, nan, nan), (4, 2, True, nan, nan), (4, 2, False, nan, 1.0), (4, 2, True, 1.0, 1.0)]
    used = np.array([True, True, True, False])
    objective = RewardObjective(pairs_of(*rows), used, optimisation, 0, "cpu")
    assert objective.rows == 2
    assert {int(i) for step in range(5) for i in objective.batches[step]} == {1, 2}
    for batch in objective.microbatches(0):
        loss, _ = objective.loss(Given(), batch)
        assert torch.isfinite(loss)


def reward_model_of(config: Callable[..., Config], tmp_path: Any, seed: int = 0) -> Any:
    made_model().save_pretrained(tmp_path / "sft")
    model = config().model
    return new_reward_model(
        tmp_path / "sft", model, own=True, pad_id=0, seed=seed, device=torch.device("cpu")
    )


def test_a_new_reward_model_is_the_backbone_with_a_drawn_layer(
    config: Callable[..., Config], tmp_path: Any, optimisation: RewardOptimisation
) -> None:
    model, again, other = (reward_model_of(config, tmp_path, seed) for seed in (0, 0, 1))
    backbone = made_model().model.state_dict()
    assert all(torch.equal(tensor, backbone[name]) for name, tensor in model.model.state_dict().items())
    layers = [output_layer(m).weight for m in (model, again, other)]
    assert layers[0].shape == (2, 32)
    assert torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[0], layers[2])
    assert model.config.id2label == {0: "helpfulness", 1: "safety"}
    assert not model.training
    select_trained(model, optimisation.model_copy(update={"trainable": ["mlp.down_proj"]}))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "score.weight",
    ]


def test_how_a_step_is_cut_up_changes_nothing(
    config: Callable[..., Config], tmp_path: Any, optimisation: RewardOptimisation
) -> None:
    """In loss and gradients, with some orders and labels missing."""
    pairs, rng = made_pairs(40, longest=40), np.random.default_rng(0)
    missing = rng.random((3, 40)) < 0.3
    pairs = replace(
        pairs,
        safe_w=np.where(missing[0], np.nan, pairs.safe_w).astype(np.float32),
        safe_l=np.where(missing[1], np.nan, pairs.safe_l).astype(np.float32),
        ordered=~missing[2],
    )
    model, results = reward_model_of(config, tmp_path), []
    for microbatch in (8, 3, 1):
        cut = optimisation.model_copy(update={"microbatch": microbatch})
        objective = RewardObjective(pairs, np.ones(40, bool), cut, 0, "cpu")
        model.zero_grad(set_to_none=True)
        total = 0.0
        for batch in objective.microbatches(3):
            loss, _ = objective.loss(model, batch)
            loss.backward()
            total += loss.item()
        results.append((total, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        for gradient, expected in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_the_model_learns_what_the_pairs_say(
    config: Callable[..., Config], tmp_path: Any, optimisation: RewardOptimisation
) -> None:
    """Token 10 is what makes a response better, token 20 what makes it unsafe."""
    from bfpo_exp.train.engine import PlainEngine
    from bfpo_exp.train.loop import train

    rng = np.random.default_rng(0)

    def response(better: bool, safe: bool) -> list[int]:
        filler = rng.integers(30, VOCABULARY, 6).tolist()
        return [*filler, *([10] if better else []), *([] if safe else [20]), END_OF_TURN]

    safe = rng.integers(0, 2, (2, 200))
    pairs = replace(
        made_pairs(200),
        w_ids=[response(True, bool(s)) for s in safe[0]],
        l_ids=[response(False, bool(s)) for s in safe[1]],
        safe_w=safe[0].astype(np.float32),
        safe_l=safe[1].astype(np.float32),
    )
    model, optimisation = reward_model_of(config, tmp_path), optimisation.model_copy(update={"lr": 5e-3})
    objective = RewardObjective(pairs, np.ones(200, bool), optimisation, 0, "cpu")
    select_trained(model, optimisation)
    engine = PlainEngine(model, [p for p in model.parameters() if p.requires_grad], optimisation, 150)
    log: list[dict[str, float]] = []
    train(engine, objective, 150, 10, lambda taken, values: log.append(dict(values)))
    assert log[0]["safety_loss"] > 0.5
    assert log[-1]["helpfulness_loss"] < 0.2
    assert log[-1]["safety_loss"] < 0.2


# ---------------------------------------------------------------- what is held out


def test_the_held_out_prompts_are_not_those_of_the_data() -> None:
    """Else data.heldout=0.1 would take all of them away."""
    prompts = [[Message(role="user", content=f"open door {i}")] for i in range(4000)]
    ours = np.array([is_held_out(prompt, 0.1, SPLIT) for prompt in prompts])
    datas = np.array([is_held_out(prompt, 0.1) for prompt in prompts])
    assert 0.08 < ours.mean() < 0.12
    assert 0.05 < ours[datas].mean() < 0.15
    assert is_held_out([Message(role="user", content="Open  DOOR 7")], 0.5, SPLIT) == is_held_out(
        prompts[7], 0.5, SPLIT
    )


# ---------------------------------------------------------------- how good it is


def test_calibration_by_hand() -> None:
    """Two bins: 0.12 and 0.18 (mean 0.15, half of them true), 0.9 (true)."""
    bins = Reliability.of(np.array([0.12, 0.9, 0.18, 1.0]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert bins.predicted.tolist() == pytest.approx([0.15, 0.95])
    assert bins.observed.tolist() == [0.5, 1.0]
    assert bins.counts.tolist() == [2, 2]
    assert bins.error == pytest.approx((2 * 0.35 + 2 * 0.05) / 4)


def test_auc_by_hand() -> None:
    scores, positive = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert auc(scores, positive) == 0.75
    assert auc(-scores, positive) == 0.25
    assert auc(np.zeros(4), positive) == 0.5
    assert np.isnan(auc(scores, np.ones(4, bool)))


def test_quality_by_hand() -> None:
    """Of three ordered pairs two are right; of five labels four are, of which four say safe."""
    nan = float("nan")
    logits = {
        "helpfulness": np.array([[1.0, 0.0], [0.5, 1.5], [3.0, 0.0], [0.0, 9.0]]),
        "safety": np.array([[2.0, -2.0], [2.0, 2.0], [2.0, 0.5], [0.0, 0.0]]),
    }
    safe = np.array([[1.0, 0.0], [1.0, 1.0], [nan, nan], [1.0, nan]])
    quality = measured(logits, np.array([True, True, True, False]), safe)
    values = quality.values
    assert values["helpfulness_accuracy"] == pytest.approx(2 / 3)
    chances = 1 / (1 + np.exp(-np.array([1.0, -1.0, 3.0])))
    assert values["helpfulness_brier"] == pytest.approx(((1 - chances) ** 2).mean())
    assert values["helpfulness_heldout"] == 3
    assert values["safety_accuracy"] == pytest.approx(4 / 5)  # a logit of 0 says unsafe
    assert values["safety_majority"] == pytest.approx(4 / 5)
    assert values["safety_auc"] == 1.0
    assert values["safety_heldout"] == 5
    assert quality.lines[0].startswith("helpfulness: 66.7% of 3 held-out orders right (chance 50.0%)")


def test_a_head_without_labels_is_left_out() -> None:
    logits = {name: np.zeros((2, 2)) for name in ("helpfulness", "safety")}
    quality = measured(logits, np.zeros(2, bool), np.ones((2, 2)))
    assert set(quality.reliability) == {"safety"}
    assert "safety_auc" not in quality.values, "all labels are of one kind"
    assert quality.lines[0].startswith("safety: 0.0% of 4")
    assert measured(logits, np.zeros(2, bool), np.full((2, 2), np.nan)).lines == []


def test_an_average_response_is_preferred_half_the_time() -> None:
    heads = heads_of({"helpfulness": np.array([[1.0, 3.0], [2.0, 6.0]]), "safety": np.zeros((2, 2))})
    assert heads.helpfulness.centre == 3.0
    assert heads.safety.centre == 0.0
