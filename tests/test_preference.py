"""The preference objective: which response stands first, with what beside it, and what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bfpo_exp.config.schema import Config
from bfpo_exp.data.pairs import TokenisedPairs, order_signs
from bfpo_exp.logprobs.paths import SHARED
from bfpo_exp.logprobs.reference import PairLogps
from bfpo_exp.logprobs.shared import SharedRow
from bfpo_exp.train import preference
from bfpo_exp.train.preference import PreferenceObjective

PreferenceConfig = Callable[..., Config]

# ---------------------------------------------------------------- the view of a pair

NAN = float("nan")
# Two pairs of each stream: the more helpful response is the safer one in the first of them, and the
# less safe one in the second; the fifth lacks both orders.
HAND = TokenisedPairs(
    prompt_ids=[[1, 10], [1, 11], [1, 12], [1, 13], [1, 14]],
    w_ids=[[20, 2], [21, 2], [22, 2], [23, 2], [24, 2]],
    l_ids=[[30, 2], [31, 2], [32, 2], [33, 2], [34, 2]],
    safe_w=np.array([1, 0, 1, 0, NAN], np.float32),
    safe_l=np.array([0, 1, 0, 1, NAN], np.float32),
    safer=np.array([1, -1, 1, -1, 0], np.int8),
    ordered=np.array([True, True, True, True, False]),
    stream=np.array([0, 0, 1, 1, 0], np.int8),
)
HAND_LOGPS = PairLogps(
    w_sum=np.array([-1, -2, -3, -4, -5], np.float32),
    l_sum=np.array([-10, -20, -30, -40, -50], np.float32),
    w_count=np.array([2, 2, 2, 2, 2]),
    l_count=np.array([4, 4, 4, 4, 4]),
)


@pytest.mark.parametrize(
    ("order", "signs"),
    [
        ("helpfulness", [1, 1, 1, 1, 0]),
        ("safety", [1, -1, 1, -1, 0]),
        ("stream", [1, 1, 1, -1, 0]),
    ],
)
def test_orders_by_hand(order: Any, signs: list[int]) -> None:
    assert order_signs(HAND, order).tolist() == signs


@pytest.mark.parametrize(("order", "swapped"), [("helpfulness", []), ("safety", [1, 3]), ("stream", [3])])
def test_a_view_swaps_responses_with_their_labels_and_log_probs(
    order: str, swapped: list[int], preference_config: PreferenceConfig
) -> None:
    objective = PreferenceObjective(HAND, HAND_LOGPS, preference_config("dpo", loss__order=order), "cpu")
    indices = np.array([3, 0, 1, 2])
    view = objective.view(indices)
    assert isinstance(view.rows, SharedRow)
    targets = iter(view.rows.targets.tolist())
    for place, i in enumerate(indices):
        first, second = ("l", "w") if i in swapped else ("w", "l")
        for ids in (getattr(HAND, f"{first}_ids")[i], getattr(HAND, f"{second}_ids")[i]):
            assert [next(targets) for _ in ids] == ids
        assert view.given["safe_w"][place] == getattr(HAND, f"safe_{first}")[i]
        assert view.given["safe_l"][place] == getattr(HAND, f"safe_{second}")[i]
        assert view.given["ref_w"][place] == getattr(HAND_LOGPS, f"{first}_sum")[i]
        assert view.given["ref_l"][place] == getattr(HAND_LOGPS, f"{second}_sum")[i]


def test_by_safety_order_the_first_response_is_the_safe_one(preference_config: PreferenceConfig) -> None:
    objective = PreferenceObjective(HAND, HAND_LOGPS, preference_config("dpo", loss__order="safety"), "cpu")
    view = objective.view(np.arange(4))
    assert view.given["safe_w"].tolist() == [1, 1, 1, 1]
    assert view.given["safe_l"].tolist() == [0, 0, 0, 0]
    assert isinstance(view.rows, SharedRow)
    starts = [0, *view.rows.response_mask.sum(1).cumsum(0).tolist()]
    assert view.rows.targets[starts[:-1:2]].tolist() == [20, 31, 22, 33]
    assert view.given["ref_w"].tolist() == [-1, -20, -3, -40]


def test_means_divide_each_response_by_its_own_length(preference_config: PreferenceConfig) -> None:
    objective = PreferenceObjective(
        HAND, HAND_LOGPS, preference_config("ipo", loss__order="safety", loss__logps="mean"), "cpu"
    )
    view = objective.view(np.array([0, 1]))
    assert view.given["ref_w"].tolist() == [-0.5, -5.0]  # -1 / 2 and, swapped, -20 / 4
    assert view.given["ref_l"].tolist() == [-2.5, -1.0]


# ---------------------------------------------------------------- statistics

# Three pairs with log-ratios (2, 1, -1) of y_w and (-2, 4, 3) of y_l, so h = (4, -3, -4), in the cells
# (safe, unsafe), (unsafe, safe), (unsafe, unsafe): g = (1, -1, -0.5), and g / 0.5 = (2, -2, -1).
REF_W, REF_L = [-5.0, -6.0, -7.0], [-8.0, -9.0, -10.0]
POLICY_W, POLICY_L = [-3.0, -5.0, -8.0], [-10.0, -5.0, -7.0]


def statistics(
    monkeypatch: pytest.MonkeyPatch, config: Config, safe_w: list[float], safe_l: list[float]
) -> tuple[float, dict[str, float]]:
    """The loss and the statistics of three pairs whose policy log-probs are the given ones."""
    n = len(POLICY_W)
    pairs = TokenisedPairs(
        prompt_ids=[[1]] * n,
        w_ids=[[3, 2]] * n,
        l_ids=[[4, 2]] * n,
        safe_w=np.array(safe_w, np.float32),
        safe_l=np.array(safe_l, np.float32),
        safer=np.ones(n, np.int8),
        ordered=np.ones(n, bool),
        stream=np.zeros(n, np.int8),
    )
    counts = np.full(n, 2)
    logps = PairLogps(np.array(REF_W, np.float32), np.array(REF_L, np.float32), counts, counts)
    policy = torch.tensor([POLICY_W, POLICY_L]).T.reshape(-1)
    path = dataclasses.replace(SHARED, logps=lambda model, rows: (policy, torch.full((2 * n,), 2)))
    monkeypatch.setattr(preference, "chosen_path", lambda *_: path)
    objective = PreferenceObjective(pairs, logps, config, "cpu")
    loss, sums = objective.loss(nn.Identity(), objective.view(np.arange(n)))
    return loss.item(), sums.read()


def test_bfpo_statistics_by_hand(
    monkeypatch: pytest.MonkeyPatch, preference_config: PreferenceConfig
) -> None:
    run = preference_config("bfpo", loss__beta=0.5, data__batches="shuffle")
    loss, values = statistics(monkeypatch, run, [1, 0, 0], [0, 1, 0])
    assert loss == pytest.approx((4 + 1 + 9) / 16)  # (4-2)^2, (-3+2)^2, (-4+1)^2 over the batch of 16
    assert values["loss"] == pytest.approx(14 / 3)
    assert values["loss_at_reference"] == pytest.approx((4 + 4 + 1) / 3)
    assert values["margin"] == pytest.approx(-1.0)  # nats: (4 - 3 - 4) / 3, not times beta
    assert values["accuracy"] == 1.0  # h has the label's sign in every pair
    assert values["kl"] == pytest.approx(-(2 + 1 - 1 - 2 + 4 + 3) / 6)
    assert values["reward_safe"] == pytest.approx(0.5 * (2 + 4) / 2)
    assert values["reward_unsafe"] == pytest.approx(0.5 * (1 - 1 - 2 + 3) / 4)
    cells = {name: count for name, count in values.items() if name.startswith("cell_")}
    assert cells == {
        "cell_safe_safe": 0,
        "cell_safe_unsafe": 1,
        "cell_unsafe_safe": 1,
        "cell_unsafe_unsafe": 1,
    }


def test_rewards_are_chosen_by_mask_and_not_by_index(
    monkeypatch: pytest.MonkeyPatch, preference_config: PreferenceConfig
) -> None:
    run = preference_config("dpo", loss__beta=0.5, data__batches="shuffle")
    labels = torch.tensor([1, 0, 0])
    rewards_w = 0.5 * torch.tensor([2.0, 1.0, -1.0])
    slip = rewards_w[labels].mean().item()  # what a label used as an index gives
    _, values = statistics(monkeypatch, run, [1, 0, 0], [NAN, NAN, NAN])
    assert values["reward_safe"] == pytest.approx(rewards_w[0].item())
    assert values["reward_unsafe"] == pytest.approx(rewards_w[1:].mean().item())
    assert slip not in (pytest.approx(values["reward_safe"]), pytest.approx(values["reward_unsafe"]))


@pytest.mark.parametrize(
    ("loss", "changes", "accuracy"),
    [
        ("dpo", {}, 1 / 3),  # h > 0 is wanted of every pair
        ("bfpo", {}, 1.0),
        # alpha = 0: nothing is wanted of the third pair, and it is not counted
        ("bfpo", {"loss__alpha": 0.0}, 1.0),
        # alpha = -2 makes every label positive
        ("bfpo", {"loss__alpha": -2.0}, 1 / 3),
    ],
)
def test_accuracy_is_of_the_wanted_sign(
    loss: str,
    changes: dict[str, float],
    accuracy: float,
    monkeypatch: pytest.MonkeyPatch,
    preference_config: PreferenceConfig,
) -> None:
    run = preference_config(loss, data__batches="shuffle", **changes)
    _, values = statistics(monkeypatch, run, [1, 0, 0], [0, 1, 0])
    assert values["accuracy"] == pytest.approx(accuracy)


def test_missing_labels_are_in_no_cell_and_in_no_reward(
    monkeypatch: pytest.MonkeyPatch, preference_config: PreferenceConfig
) -> None:
    run = preference_config("dpo", data__batches="shuffle")
    _, values = statistics(monkeypatch, run, [1, NAN, NAN], [NAN, NAN, NAN])
    assert sum(count for name, count in values.items() if name.startswith("cell_")) == 0
    assert values["reward_safe"] == pytest.approx(0.2 * 2)
    assert "reward_unsafe" not in values


def test_a_probability_counts_as_safe_from_one_half(
    monkeypatch: pytest.MonkeyPatch, preference_config: PreferenceConfig
) -> None:
    run = preference_config("dpo", loss__beta=0.5, data__batches="shuffle")
    _, values = statistics(monkeypatch, run, [0.5, 0.49, NAN], [0.1, 0.9, NAN])
    assert (values["cell_safe_unsafe"], values["cell_unsafe_safe"]) == (1, 1)
    assert values["reward_safe"] == pytest.approx(0.5 * (2 + 4) / 2)
    assert values["reward_unsafe"] == pytest.approx(0.5 * (1 - 2) / 2)
