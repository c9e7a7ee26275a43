"""The losses that BFPO is compared with: worked by hand, and where one of them is another."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_support import batches, betas, labelled, laws, logps_of, tensor
from torch import Tensor

from bfpo_exp.losses import (
    bso_loss,
    dpo_loss,
    hinge_loss,
    kto_loss,
    modpo_loss,
    robust_dpo_loss,
    sacpo_loss,
    safedpo_loss,
    simpo_loss,
)
from bfpo_exp.losses.safety import bso_clamped

# h = [-1 - (-4)] - [-2 - (-3)] = 3 - 1 = 2, log-ratios r_w = 1 and r_l = -1
H2 = {"policy_w": tensor(-1), "policy_l": tensor(-4), "ref_w": tensor(-2), "ref_l": tensor(-3)}
FOUR = {name: values.repeat(4) for name, values in H2.items()}
# (safe, unsafe), (safe, safe), (unsafe, unsafe), (unsafe, safe)
CELLS = {"safe_w": tensor(1, 1, 0, 0), "safe_l": tensor(0, 1, 0, 1)}


def softplus(x: float) -> float:
    """-log sigmoid(-x), in Python's floats."""
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- by hand


def test_conservative_dpo() -> None:
    """beta h = 1: 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262."""
    assert dpo_loss(**H2, beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.41326169, abs=1e-6)


def test_robust_dpo() -> None:
    """beta h = 1: (0.9 * 0.313262 - 0.1 * 1.313262) / 0.8 = 0.188262."""
    assert robust_dpo_loss(**H2, beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.18826169, abs=1e-6)


def test_hinge() -> None:
    """1 - 0.2 * 2 = 0.6; beyond the margin, at beta h = 2, it is 0."""
    assert hinge_loss(**H2, beta=0.2).item() == pytest.approx(0.6)
    assert hinge_loss(**H2, beta=1.0).item() == 0


def test_simpo() -> None:
    """beta * (-0.5 - (-0.8)) - gamma = 2 * 0.3 - 1 = -0.4: log(1 + e^0.4)."""
    loss = simpo_loss(policy_w=tensor(-0.5), policy_l=tensor(-0.8), beta=2.0, gamma=1.0)
    assert loss.item() == pytest.approx(softplus(0.4))


def test_kto() -> None:
    """r_w = 1, r_l = -1, beta = 0.5; the pair's mean log-ratio is 0, so z = 0: 2 (1 - sigmoid(0.5))."""
    assert kto_loss(**H2, beta=0.5).item() == pytest.approx(2 * sigmoid(-0.5))
    weighted = kto_loss(**H2, beta=0.5, desirable=1.0, undesirable=3.0)
    assert weighted.item() == pytest.approx(4 * sigmoid(-0.5))
    of_step = kto_loss(**H2, beta=0.5, kl=torch.tensor(0.6))  # r_w - z = 0.4, z - r_l = 1.6
    assert of_step.item() == pytest.approx(sigmoid(-0.2) + sigmoid(-0.8))
    negative = kto_loss(**H2, beta=0.5, kl=torch.tensor(-5.0))  # no KL is negative: z = 0
    assert negative.item() == pytest.approx(2 * sigmoid(-0.5))


def test_ktos_z_is_the_mean_over_the_batch_and_has_no_gradient() -> None:
    """Log-ratios 1, -1 of the first pair and 3, 1 of the second: z = 1."""
    policy_w = tensor(1, 3).requires_grad_()
    zero = torch.zeros(2)
    losses = kto_loss(policy_w=policy_w, policy_l=tensor(-1, 1), ref_w=zero, ref_l=zero, beta=1.0)
    expected = [sigmoid(0) + sigmoid(-2), sigmoid(-2) + sigmoid(0)]
    assert losses.tolist() == pytest.approx(expected)
    losses.sum().backward()
    assert policy_w.grad is not None
    # d/dr (1 - sigmoid(r - z)) = -sigmoid'(r - z), of the pair's own r alone
    assert policy_w.grad.tolist() == pytest.approx([-0.25, -sigmoid(2) * sigmoid(-2)])


def test_safedpo_keeps_swaps_and_drops() -> None:
    """beta h = 1, delta = 3.  Kept with offset: -1 + 3; kept: -1; dropped: 0; swapped: 1 + 3."""
    losses = safedpo_loss(**FOUR, **CELLS, beta=0.5, delta=3.0)
    assert losses.tolist() == pytest.approx([softplus(2), softplus(-1), 0, softplus(4)])


def test_bso() -> None:
    """beta h = 1, C = 3: log R = -1 + 3, -1, -1, -1 - 3; nothing is swapped or dropped."""
    losses = bso_loss(**FOUR, **CELLS, beta=0.5, penalty=3.0, clamp=30.0)
    assert losses.tolist() == pytest.approx([softplus(2), softplus(-1), softplus(-1), softplus(-4)])


def test_bso_beyond_its_clamp_has_no_gradient_and_is_counted() -> None:
    """The clamp 1.5 cuts log R = 2 and -4, not -1."""
    policy_w = FOUR["policy_w"].clone().requires_grad_()
    batch = {**FOUR, "policy_w": policy_w, **CELLS}
    losses = bso_loss(**batch, beta=0.5, penalty=3.0, clamp=1.5)
    assert losses.tolist() == pytest.approx([softplus(1.5), softplus(-1), softplus(-1), softplus(-1.5)])
    losses.sum().backward()
    assert policy_w.grad is not None
    assert (policy_w.grad == 0).tolist() == [True, False, False, True]
    assert bso_clamped(**batch, beta=0.5, penalty=3.0, clamp=1.5).tolist() == [1, 0, 0, 1]


def test_modpo() -> None:
    """beta h = 1, weight 0.25, m_w - m_l = 2: (1 - 0.75 * 2) / 0.25 = -2."""
    loss = modpo_loss(**H2, margin_w=tensor(5), margin_l=tensor(3), beta=0.5, weight=0.25)
    assert loss.item() == pytest.approx(softplus(2))


def test_sacpo() -> None:
    """beta / lambda = 0.5 / 2: log(1 + e^-0.5)."""
    assert sacpo_loss(**H2, beta=0.5, trade_off=2.0).item() == pytest.approx(softplus(-0.5))


def test_without_a_reference_the_margin_is_the_policys() -> None:
    """log pi(y_w) - log pi(y_l) = 3."""
    free = {**H2, "ref_w": None, "ref_l": None}
    assert dpo_loss(**free, beta=0.5).item() == pytest.approx(softplus(-1.5))
    assert hinge_loss(**free, beta=0.2).item() == pytest.approx(0.4)


# ---------------------------------------------------------------- where one loss is another


@laws
@given(batches(), betas, st.floats(0, 20))
def test_losses_that_are_dpo(batch: dict[str, Tensor], beta: float, offset: float) -> None:
    dpo = dpo_loss(**logps_of(batch), beta=beta)
    all_safe = {**labelled(batch), "safe_w": torch.ones_like(dpo), "safe_l": torch.ones_like(dpo)}
    margins = {name: batch[name] for name in ("margin_w", "margin_l")}
    others = {
        "cDPO without smoothing": dpo_loss(**logps_of(batch), beta=beta, label_smoothing=0.0),
        "robust DPO without noise": robust_dpo_loss(**logps_of(batch), beta=beta, label_smoothing=0.0),
        "SafeDPO on safe pairs": safedpo_loss(**all_safe, beta=beta, delta=offset),
        "BSO on safe pairs": bso_loss(**all_safe, beta=beta, penalty=offset, clamp=1e9),
        "BSO without penalty": bso_loss(**labelled(batch), beta=beta, penalty=0.0, clamp=1e9),
        "MODPO with one objective": modpo_loss(**logps_of(batch), **margins, beta=beta, weight=1.0),
        "SACPO with lambda 1": sacpo_loss(**logps_of(batch), beta=beta, trade_off=1.0),
    }
    for name, losses in others.items():
        torch.testing.assert_close(losses, dpo, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@laws
@given(batches(), betas, st.floats(0, 20))
def test_bso_is_safedpo_where_safedpo_does_not_swap(
    batch: dict[str, Tensor], beta: float, offset: float
) -> None:
    batch = {**labelled(batch), "safe_w": torch.ones_like(batch["safe_w"])}
    torch.testing.assert_close(
        bso_loss(**batch, beta=beta, penalty=offset, clamp=1e9),
        safedpo_loss(**batch, beta=beta, delta=offset),
        rtol=1e-12,
        atol=1e-12,
    )


@laws
@given(batches(), betas, st.floats(0, 20))
def test_safedpo_does_not_care_in_which_order_a_mixed_pair_comes(
    batch: dict[str, Tensor], beta: float, delta: float
) -> None:
    one, zero = torch.ones_like(batch["safe_w"]), torch.zeros_like(batch["safe_w"])
    swapped = {f"{n}_w": batch[f"{n}_l"] for n in ("policy", "ref")}
    swapped |= {f"{n}_l": batch[f"{n}_w"] for n in ("policy", "ref")}
    torch.testing.assert_close(
        safedpo_loss(**logps_of(batch), safe_w=one, safe_l=zero, beta=beta, delta=delta),
        safedpo_loss(**swapped, safe_w=zero, safe_l=one, beta=beta, delta=delta),
    )


@laws
@given(batches(largest=30.0), st.floats(0.01, 1), st.floats(0, 0.45))
def test_robust_dpo_is_unbiased_under_flipped_labels(
    batch: dict[str, Tensor], beta: float, flips: float
) -> None:
    """E over a label that flips with probability e: (1 - e) loss(kept) + e loss(swapped) = DPO."""
    batch = logps_of(batch)
    swapped = {f"{n}_w": batch[f"{n}_l"] for n in ("policy", "ref")}
    swapped |= {f"{n}_l": batch[f"{n}_w"] for n in ("policy", "ref")}
    kept, flipped = (robust_dpo_loss(**b, beta=beta, label_smoothing=flips) for b in (batch, swapped))
    torch.testing.assert_close(
        (1 - flips) * kept + flips * flipped, dpo_loss(**batch, beta=beta), rtol=1e-6, atol=1e-6
    )


@laws
@given(batches(), betas)
def test_modpos_margin_shifts_what_is_asked_for(batch: dict[str, Tensor], beta: float) -> None:
    """weight 1/2: -log sigmoid(2 beta h - (m_w - m_l)), so a margin of 2 beta h leaves ln 2."""
    h = (batch["policy_w"] - batch["policy_l"]) - (batch["ref_w"] - batch["ref_l"])
    losses = modpo_loss(
        **logps_of(batch), margin_w=2 * beta * h, margin_l=torch.zeros_like(h), beta=beta, weight=0.5
    )
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-9)
