"""The losses: worked by hand, held to their laws, and what the registry reads off them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_support import (
    HYPERPARAMETERS,
    SAFETY_LABELS,
    at_reference,
    b1s,
    batches,
    betas,
    every_loss,
    labelled,
    laws,
    logps_of,
    losses_of,
    tensor,
)
from torch import Tensor

from bfpo_exp.errors import UserError
from bfpo_exp.losses import (
    LOSSES,
    LabelOrderWarning,
    bfpo_label,
    bfpo_loss,
    cell_labels,
    dpo_loss,
    ipo_loss,
    log_ratio_margin,
)

# (safe_w, safe_l) of the four cells, and g there for (b1, alpha): b1 and alpha are chosen so that
# b3 = 1 / (b1 - 1) is 1/2, 1 or 1/4.
CELLS = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
LABELS = {
    (3.0, 0.5): [1.0, 0.5, -0.5, -1.0],
    (3.0, 0.0): [1.5, 1.0, 0.0, -0.5],
    (2.0, 0.5): [1.5, 0.5, -0.5, -1.5],
    (5.0, 0.25): [1.0, 0.75, -0.25, -0.5],
}


def label_by_hand(safe_w: Tensor, safe_l: Tensor, b1: float, alpha: float) -> Tensor:
    """The published formula, term by term in Python's floats."""
    b3 = 1 / (b1 - 1)
    return torch.tensor(
        [b3 * (b1 * w - l) - alpha for w, l in zip(safe_w.tolist(), safe_l.tolist(), strict=True)],  # noqa: E741
        dtype=torch.float64,
    )


# ---------------------------------------------------------------- by hand

# h = [-1 - (-4)] - [-2 - (-3)] = 3 - 1 = 2
H2 = {"policy_w": tensor(-1), "policy_l": tensor(-4), "ref_w": tensor(-2), "ref_l": tensor(-3)}


def test_the_margin_is_the_policys_log_ratio_less_the_references() -> None:
    assert log_ratio_margin(**H2).tolist() == [2.0]


def test_dpo_by_hand() -> None:
    """-log sigmoid(0.5 * 2) = log(1 + e^-1) = 0.313262; of h = -2: log(1 + e) = 1.313262."""
    assert dpo_loss(**H2, beta=0.5).item() == pytest.approx(0.31326169, abs=1e-6)
    swapped = {"policy_w": tensor(-4), "policy_l": tensor(-1), "ref_w": tensor(-3), "ref_l": tensor(-2)}
    assert dpo_loss(**swapped, beta=0.5).item() == pytest.approx(1.31326169, abs=1e-6)


def test_ipo_by_hand() -> None:
    """beta = 0.5: (2 - 1)^2 = 1; beta = 0.1: (2 - 5)^2 = 9."""
    assert ipo_loss(**H2, beta=0.5).item() == pytest.approx(1.0)
    assert ipo_loss(**H2, beta=0.1).item() == pytest.approx(9.0)


@pytest.mark.parametrize(("constants", "labels"), LABELS.items())
def test_label_by_hand(constants: tuple[float, float], labels: list[float]) -> None:
    b1, alpha = constants
    safe_w, safe_l = map(torch.tensor, zip(*CELLS, strict=True))
    assert bfpo_label(safe_w=safe_w, safe_l=safe_l, b1=b1, alpha=alpha).tolist() == pytest.approx(labels)


def test_bfpo_by_hand() -> None:
    """beta = 0.5 doubles the labels 1, 0.5, -0.5, -1: (2-2)^2, (2-1)^2, (2+1)^2, (2+2)^2."""
    safe_w, safe_l = map(torch.tensor, zip(*CELLS, strict=True))
    four = {name: values.repeat(4) for name, values in H2.items()}
    losses = bfpo_loss(**four, safe_w=safe_w, safe_l=safe_l, beta=0.5, b1=3.0, alpha=0.5)
    assert losses.tolist() == pytest.approx([0.0, 1.0, 9.0, 16.0])


def test_labels_may_be_probabilities_of_being_safe() -> None:
    """0.5 * (3 * 0.8 - 0.3) - 0.5 = 0.55; and g is what the four cells give in expectation."""
    g = bfpo_label(safe_w=tensor(0.8), safe_l=tensor(0.3), b1=3.0, alpha=0.5)
    assert g.item() == pytest.approx(0.55)
    chances = [0.8 * 0.7, 0.8 * 0.3, 0.2 * 0.7, 0.2 * 0.3]  # of CELLS
    expected = sum(p * cell for p, cell in zip(chances, LABELS[3.0, 0.5], strict=True))
    assert g.item() == pytest.approx(expected)


# ---------------------------------------------------------------- laws


@laws
@given(batches(), betas, b1s, st.floats(-1, 2))
def test_loss_at_policy_equal_to_reference(
    batch: dict[str, Tensor], beta: float, b1: float, alpha: float
) -> None:
    batch = at_reference(batch)
    ones = torch.ones_like(batch["ref_w"])
    torch.testing.assert_close(dpo_loss(**logps_of(batch), beta=beta), ones * math.log(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(ipo_loss(**logps_of(batch), beta=beta), ones * (1 / (2 * beta)) ** 2)
    g = label_by_hand(batch["safe_w"], batch["safe_l"], b1, alpha)
    torch.testing.assert_close(
        bfpo_loss(**labelled(batch), beta=beta, b1=b1, alpha=alpha), (g / beta) ** 2, rtol=1e-7, atol=1e-9
    )


@laws
@given(batches(), betas, b1s)
def test_bfpo_on_safe_pairs_with_a_shift_of_one_half_is_ipo(
    batch: dict[str, Tensor], beta: float, b1: float
) -> None:
    safe = torch.ones_like(batch["safe_w"])
    torch.testing.assert_close(
        bfpo_loss(**logps_of(batch), safe_w=safe, safe_l=safe, beta=beta, b1=b1, alpha=0.5),
        ipo_loss(**logps_of(batch), beta=beta),
        rtol=1e-9,
        atol=1e-9,
    )


@laws
@given(batches(dtypes=(torch.float32, torch.bfloat16, torch.float64)))
def test_swapping_the_responses_negates_the_margin(batch: dict[str, Tensor]) -> None:
    h = log_ratio_margin(**logps_of(batch))
    swapped = log_ratio_margin(
        policy_w=batch["policy_l"], policy_l=batch["policy_w"], ref_w=batch["ref_l"], ref_l=batch["ref_w"]
    )
    assert torch.equal(swapped, -h)


@laws
@given(b1s, st.floats(0.001, 0.999))
def test_labels_keep_the_papers_order(b1: float, alpha: float) -> None:
    """(safe, unsafe) > (safe, safe) > 0 > (unsafe, unsafe) > (unsafe, safe) for 0 < alpha < 1."""
    safe_w, safe_l = (torch.tensor(labels, dtype=torch.float64) for labels in zip(*CELLS, strict=True))
    g = bfpo_label(safe_w=safe_w, safe_l=safe_l, b1=b1, alpha=alpha).tolist()
    assert g[0] > g[1] > 0 > g[2] > g[3]


@every_loss
@laws
@given(batch=batches(), data=st.data())
def test_permuting_a_batch_permutes_the_losses(
    name: str, batch: dict[str, Tensor], data: st.DataObject
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(batch["ref_w"])))))
    permuted = {key: values[order] for key, values in batch.items()}
    losses, of_permuted = losses_of(name, batch), losses_of(name, permuted)
    # KTO's mean over the batch is summed in another order
    torch.testing.assert_close(of_permuted, losses[order], rtol=1e-9, atol=1e-12)


@every_loss
@laws
@given(batch=batches(largest=1e4, dtypes=(torch.float32, torch.bfloat16, torch.float64)))
def test_every_precision_is_raised_to_float32_and_stays_finite(name: str, batch: dict[str, Tensor]) -> None:
    given_dtype = batch["ref_w"].dtype
    dtype = torch.float64 if given_dtype == torch.float64 else torch.float32
    leaves = {key: values.clone().requires_grad_(key not in SAFETY_LABELS) for key, values in batch.items()}
    losses = losses_of(name, leaves)
    assert losses.dtype == dtype
    assert losses.shape == batch["ref_w"].shape
    assert torch.isfinite(losses).all()
    raised = {key: values.to(dtype) for key, values in batch.items()}
    assert torch.equal(losses, losses_of(name, raised))
    losses.sum().backward()
    assert torch.isfinite(leaves["policy_w"].grad).all()  # type: ignore[arg-type]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_log_probs_give_finite_losses(name: str, dtype: torch.dtype) -> None:
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 4)
    extremes = (1e4 * signs).to(dtype).T
    batch = dict(zip(("policy_w", "policy_l", "ref_w", "ref_l"), extremes, strict=True))
    batch |= {"safe_w": torch.ones_like(extremes[0]), "safe_l": torch.zeros_like(extremes[0])}
    batch |= {"margin_w": extremes[1], "margin_l": extremes[2]}
    losses = losses_of(name, batch)
    assert torch.isfinite(losses).all()
    assert name == "robust_dpo" or (losses >= 0).all()  # robust DPO rewards what it takes for wrong labels


# ---------------------------------------------------------------- gradients


@every_loss
def test_gradients_against_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    spec = LOSSES[name]

    def drawn(argument: str) -> Tensor:
        values = torch.rand(12, dtype=torch.float64, generator=generator)
        return values if argument in SAFETY_LABELS else 6 * values - 3

    tensors = [drawn(argument).requires_grad_() for argument in spec.tensors]
    constants = {argument: tensor(0.7, dtype=torch.float64).squeeze() for argument in spec.step_means}

    def loss(*values: Tensor) -> Tensor:
        given = dict(zip(spec.tensors, values, strict=True))
        return spec({**given, **constants}, HYPERPARAMETERS[name])

    assert torch.autograd.gradcheck(loss, tensors)
    (gradient,) = torch.autograd.grad(loss(*tensors).sum(), tensors[0])
    assert gradient.abs().sum() > 0


def test_dpo_gradient_by_hand() -> None:
    """d/d log pi(y_w) = -beta sigmoid(-beta h): -0.5 sigmoid(-1) = -0.134471; the other negates it."""
    batch = {name: values.clone().requires_grad_() for name, values in H2.items()}
    dpo_loss(**batch, beta=0.5).sum().backward()
    assert batch["policy_w"].grad.item() == pytest.approx(-0.13447071)  # type: ignore[union-attr]
    assert batch["policy_l"].grad.item() == pytest.approx(0.13447071)  # type: ignore[union-attr]


# ---------------------------------------------------------------- bad input


@every_loss
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_log_probs_that_are_not_finite_name_their_rows(name: str, wrong: float) -> None:
    rows = [1, 4]
    for argument in LOSSES[name].tensors:
        if argument in SAFETY_LABELS:
            continue
        batch = {key: torch.zeros(6) for key in LOSSES[name].tensors}
        batch[argument][rows] = wrong
        with pytest.raises(
            UserError, match=rf"^{argument} is not finite in batch rows 1, 4 \(row 1: {wrong}\)$"
        ):
            losses_of(name, batch)


def test_of_many_bad_rows_the_first_are_named() -> None:
    batch = {name: torch.full((50,), math.nan) for name in ("policy_w", "policy_l", "ref_w", "ref_l")}
    with pytest.raises(UserError, match="rows 0, 1, 2, 3, 4, 5, 6, 7 and 42 more"):
        log_ratio_margin(**batch)


@pytest.mark.parametrize("wrong", [-1.0, 2.0, 1.01, float("nan")])
def test_a_safety_label_outside_zero_to_one_names_its_row(wrong: float) -> None:
    with pytest.raises(UserError, match=r"safe_l is outside \[0, 1\] in batch rows 2 "):
        bfpo_label(safe_w=torch.zeros(3), safe_l=tensor(0, 1, wrong), b1=3.0, alpha=0.5)


@pytest.mark.parametrize("b1", [1.0, 0.5, -2.0, float("nan")])
def test_b1_has_to_be_above_one(b1: float) -> None:
    with pytest.raises(UserError, match="b1 is greater than 1"):
        bfpo_label(safe_w=torch.zeros(1), safe_l=torch.zeros(1), b1=b1, alpha=0.5)


@pytest.mark.parametrize(
    ("alpha", "collapsed", "kept"),
    [
        (0.0, ["(unsafe, unsafe) = 0 is not below 0"], ["(safe, safe) ="]),
        (-0.25, ["(unsafe, unsafe) = 0.25 is not below 0"], ["(unsafe, safe) ="]),
        (-0.5, ["(unsafe, unsafe) = 0.5 is not", "(unsafe, safe) = 0 is not below 0"], ["(safe, safe) ="]),
        (1.0, ["(safe, safe) = 0 is not above 0"], ["(safe, unsafe) =", "(unsafe, unsafe) ="]),
        (1.5, ["(safe, safe) = -0.5 is not", "(safe, unsafe) = 0 is not above 0"], ["(unsafe, safe) ="]),
    ],
)
def test_a_broken_order_names_the_cells_that_collapse(
    alpha: float, collapsed: list[str], kept: list[str]
) -> None:
    """At b1 = 3 the labels are 1.5 - alpha, 1 - alpha, -alpha and -0.5 - alpha."""
    with pytest.warns(LabelOrderWarning) as caught:
        bfpo_label(safe_w=torch.zeros(1), safe_l=torch.zeros(1), b1=3.0, alpha=alpha)
    text = str(caught[0].message)
    assert all(cell in text for cell in collapsed)
    assert not any(cell in text for cell in kept)
    assert f"(safe, unsafe) {1.5 - alpha:.4g}, (safe, safe) {1 - alpha:.4g}, " in text
    assert "holds for 0 < alpha < 1" in text


@laws
@given(b1s, st.floats(-3, 3))
def test_it_warns_exactly_where_the_order_is_broken(b1: float, alpha: float) -> None:
    g = list(cell_labels(b1, alpha).values())
    in_order = g[0] > g[1] > 0 > g[2] > g[3]
    assert in_order == (LOSSES["bfpo"].tried({"beta": 1.0, "b1": b1, "alpha": alpha}) == [])
