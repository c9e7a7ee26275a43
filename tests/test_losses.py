"""The losses: worked by hand, held to their laws, and what the registry reads off them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from pydantic import ValidationError
from torch import Tensor

from bfpo_exp.errors import UserError
from bfpo_exp.losses import LOSSES, bfpo_label, bfpo_loss, dpo_loss, get_loss, ipo_loss, log_ratio_margin
from bfpo_exp.losses import registry as loss_registry
from bfpo_exp.losses.pairwise import Beta
from bfpo_exp.paths import config_dir

# (safe_w, safe_l) of the four cells, and g there for (b1, alpha): b1 and alpha are chosen so that
# b3 = 1 / (b1 - 1) is 1/2, 1 or 1/4.
CELLS = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)]
LABELS = {
    (3.0, 0.5): [1.0, 0.5, -0.5, -1.0],
    (3.0, 0.0): [1.5, 1.0, 0.0, -0.5],
    (2.0, 0.5): [1.5, 0.5, -0.5, -1.5],
    (5.0, 0.25): [1.0, 0.75, -0.25, -0.5],
}
HYPERPARAMETERS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3},
    "ipo": {"beta": 0.3},
    "bfpo": {"beta": 0.3, "b1": 3.0, "alpha": 0.5},
}
every_loss = pytest.mark.parametrize("name", sorted(HYPERPARAMETERS))
betas, b1s = st.floats(0.01, 10), st.floats(1.1, 10)
laws = settings(max_examples=40, deadline=None)


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@st.composite
def batches(
    draw: st.DrawFn, largest: float = 300.0, dtypes: tuple[torch.dtype, ...] = (torch.float64,)
) -> dict[str, Tensor]:
    """Log-probs and 0/1 safety labels of 1 to 20 pairs."""
    n, dtype = draw(st.integers(1, 20)), draw(st.sampled_from(dtypes))
    logps = st.lists(st.floats(-largest, largest, width=32), min_size=n, max_size=n)
    labels = st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n)
    batch = {name: draw(logps) for name in ("policy_w", "policy_l", "ref_w", "ref_l")}
    batch |= {name: draw(labels) for name in ("safe_w", "safe_l")}
    return {name: torch.tensor(values, dtype=dtype) for name, values in batch.items()}


def logps_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("policy_w", "policy_l", "ref_w", "ref_l")}


def at_reference(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "policy_w": batch["ref_w"], "policy_l": batch["ref_l"]}


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
        bfpo_loss(**batch, beta=beta, b1=b1, alpha=alpha), (g / beta) ** 2, rtol=1e-7, atol=1e-9
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
    losses, of_permuted = (LOSSES[name](b, HYPERPARAMETERS[name]) for b in (batch, permuted))
    torch.testing.assert_close(of_permuted, losses[order], rtol=1e-12, atol=0)


@every_loss
@laws
@given(batch=batches(largest=1e4, dtypes=(torch.float32, torch.bfloat16, torch.float64)))
def test_every_precision_is_raised_to_float32_and_stays_finite(name: str, batch: dict[str, Tensor]) -> None:
    given_dtype = batch["ref_w"].dtype
    dtype = torch.float64 if given_dtype == torch.float64 else torch.float32
    leaves = {key: values.clone().requires_grad_() for key, values in batch.items()}
    losses = LOSSES[name](leaves, HYPERPARAMETERS[name])
    assert losses.dtype == dtype
    assert losses.shape == batch["ref_w"].shape
    assert torch.isfinite(losses).all()
    raised = {key: values.to(dtype) for key, values in batch.items()}
    assert torch.equal(losses, LOSSES[name](raised, HYPERPARAMETERS[name]))
    losses.sum().backward()
    assert torch.isfinite(leaves["policy_w"].grad).all()  # type: ignore[arg-type]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_extreme_log_probs_give_finite_losses(name: str, dtype: torch.dtype) -> None:
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 4)
    extremes = (1e4 * signs).to(dtype).T
    batch = dict(zip(("policy_w", "policy_l", "ref_w", "ref_l"), extremes, strict=True))
    batch |= {"safe_w": torch.ones_like(extremes[0]), "safe_l": torch.zeros_like(extremes[0])}
    losses = LOSSES[name](batch, HYPERPARAMETERS[name])
    assert torch.isfinite(losses).all()
    assert (losses >= 0).all()


# ---------------------------------------------------------------- gradients


@every_loss
def test_gradients_against_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    spec = LOSSES[name]
    inputs = [3 * torch.randn(6, dtype=torch.float64, generator=generator) for _ in spec.tensors]
    tensors = [values.requires_grad_() for values in inputs]

    def loss(*values: Tensor) -> Tensor:
        return spec(dict(zip(spec.tensors, values, strict=True)), HYPERPARAMETERS[name])

    assert torch.autograd.gradcheck(loss, tensors)


def test_dpo_gradient_by_hand() -> None:
    """d/d log pi(y_w) = -beta sigmoid(-beta h): -0.5 sigmoid(-1) = -0.134471; the other negates it."""
    batch = {name: values.clone().requires_grad_() for name, values in H2.items()}
    dpo_loss(**batch, beta=0.5).sum().backward()
    assert batch["policy_w"].grad.item() == pytest.approx(-0.13447071)  # type: ignore[union-attr]
    assert batch["policy_l"].grad.item() == pytest.approx(0.13447071)  # type: ignore[union-attr]


# ---------------------------------------------------------------- registry


@pytest.mark.parametrize(
    ("name", "needs_safety", "hyperparameters"),
    [("dpo", False, {"beta"}), ("ipo", False, {"beta"}), ("bfpo", True, {"beta", "b1", "alpha"})],
)
def test_needs_and_hyperparameters_are_read_off_the_signature(
    name: str, needs_safety: bool, hyperparameters: set[str]
) -> None:
    spec = get_loss(name)
    assert (spec.needs_safety, spec.needs_reference) == (needs_safety, True)
    assert set(spec.hyperparameters.model_fields) == hyperparameters


def test_a_new_loss_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_registry, "LOSSES", dict(LOSSES))

    @loss_registry.register("hinge")
    def hinge(*, policy_w: Tensor, policy_l: Tensor, beta: Beta) -> Tensor:
        return (1 - beta * (policy_w - policy_l)).relu()

    spec = get_loss("hinge")
    assert (spec.needs_safety, spec.needs_reference) == (False, False)
    assert set(spec.hyperparameters.model_fields) == {"beta"}
    assert spec(H2, {"beta": 0.1}).tolist() == pytest.approx([0.7])  # 1 - 0.1 * 3
    with pytest.raises(ValidationError, match="greater than 0"):
        spec.hyperparameters.model_validate({"beta": 0.0})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dpo", {"beta": -1}, "beta\n.*greater than 0"),
        ("ipo", {"beta": 0}, "beta\n.*greater than 0"),
        ("dpo", {"beta": math.inf}, "beta\n.*finite"),
        ("bfpo", {"b1": 1}, "b1\n.*greater than 1"),
        ("bfpo", {"alpha": math.nan}, "alpha\n.*finite"),
        ("dpo", {"alpha": 0.5}, "alpha\n.*Extra inputs"),
        ("bfpo", {"beta": "small"}, "beta\n.*valid number"),
    ],
)
def test_hyperparameters_out_of_range(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        get_loss(name).hyperparameters.model_validate({**HYPERPARAMETERS[name], **changes})


@every_loss
def test_every_hyperparameter_must_be_given(name: str) -> None:
    for missing in HYPERPARAMETERS[name]:
        given = {key: value for key, value in HYPERPARAMETERS[name].items() if key != missing}
        with pytest.raises(ValidationError, match=rf"{missing}\n.*required"):
            get_loss(name).hyperparameters.model_validate(given)


def test_unknown_loss() -> None:
    with pytest.raises(UserError, match=r"unknown loss 'bfpx'; allowed: bfpo, dpo, ipo.*; nearest: 'bfpo'"):
        get_loss("bfpx")


def test_the_wanted_sign_is_the_labels() -> None:
    safe_w, safe_l = map(torch.tensor, zip(*CELLS, strict=True))
    batch = {"policy_w": torch.zeros(4), "safe_w": safe_w, "safe_l": safe_l}
    assert get_loss("dpo").wanted_sign(batch, {"beta": 1.0}).tolist() == [1, 1, 1, 1]
    values = {"beta": 1.0, "b1": 3.0}
    assert get_loss("bfpo").wanted_sign(batch, {**values, "alpha": 0.5}).tolist() == [1, 1, -1, -1]
    assert get_loss("bfpo").wanted_sign(batch, {**values, "alpha": 0.0}).tolist() == [1, 1, 0, -1]


FILES = sorted(path.stem for path in (config_dir() / "loss").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES)
def test_a_losss_config_gives_exactly_its_hyperparameters(
    file: str, compose: Callable[..., DictConfig]
) -> None:
    given = compose(f"loss={file}").loss
    spec = get_loss(given.name)
    assert set(given) - {"name", "order", "logps"} == set(spec.hyperparameters.model_fields)


def test_every_loss_has_a_config(compose: Callable[..., DictConfig]) -> None:
    assert {compose(f"loss={file}").loss.name for file in FILES} == set(LOSSES)
