"""What the pipeline reads off a loss, and the losses' configs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_support import HYPERPARAMETERS, every_loss, tensor
from omegaconf import DictConfig
from pydantic import ValidationError
from torch import Tensor

from bfpo_exp.config.check import checked
from bfpo_exp.config.schema import Config
from bfpo_exp.errors import UserError
from bfpo_exp.losses import LOSSES, STAGED, get_loss, is_staged
from bfpo_exp.losses import registry as loss_registry
from bfpo_exp.losses.margin import Beta
from bfpo_exp.paths import config_dir

CELLS = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)]  # (safe_w, safe_l)
REFERENCE, SAFETY, MARGIN = "reference", "safety labels", "margin of a first policy"


@pytest.mark.parametrize(
    ("name", "needs", "hyperparameters"),
    [
        ("dpo", [REFERENCE], {"beta", "label_smoothing"}),
        ("ipo", [REFERENCE], {"beta"}),
        ("bfpo", [REFERENCE, SAFETY], {"beta", "b1", "alpha"}),
        ("simpo", [], {"beta", "gamma"}),
        ("kto", [REFERENCE], {"beta", "desirable", "undesirable"}),
        ("safedpo", [REFERENCE, SAFETY], {"beta", "delta"}),
        ("modpo", [REFERENCE, MARGIN], {"beta", "weight"}),
    ],
)
def test_needs_and_hyperparameters_are_read_off_the_signature(
    name: str, needs: list[str], hyperparameters: set[str]
) -> None:
    spec = get_loss(name)
    assert spec.needs == needs
    assert set(spec.hyperparameters.model_fields) == hyperparameters


def test_a_new_loss_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_registry, "LOSSES", dict(LOSSES))

    @loss_registry.register("square")
    def square(*, policy_w: Tensor, policy_l: Tensor, beta: Beta, power: Beta = 2.0) -> Tensor:
        return (beta * (policy_w - policy_l)) ** power

    spec = get_loss("square")
    assert spec.needs == []
    assert spec.hyperparameters.model_validate({"beta": 0.5}).model_dump() == {"beta": 0.5, "power": 2.0}
    given = {"policy_w": tensor(-1), "policy_l": tensor(-4), "ref_w": tensor(-2)}
    assert spec(given, {"beta": 0.5}).tolist() == pytest.approx([2.25])
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
        ("cdpo", {"label_smoothing": 0.5}, "label_smoothing\n.*less than 0.5"),
        ("modpo", {"weight": 0.0}, "weight\n.*greater than 0"),
        ("modpo", {"weight": 1.1}, "weight\n.*less than or equal to 1"),
        ("bso", {"clamp": 0}, "clamp\n.*greater than 0"),
    ],
)
def test_hyperparameters_out_of_range(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        get_loss(name).hyperparameters.model_validate({**HYPERPARAMETERS[name], **changes})


@every_loss
def test_a_hyperparameter_without_a_default_must_be_given(name: str) -> None:
    with pytest.raises(ValidationError, match=r"beta\n.*required"):
        get_loss(name).hyperparameters.model_validate({})


def test_a_loss_with_a_stage_of_its_own_stands_beside_those_of_pairs(config: Callable[..., Config]) -> None:
    for name in STAGED:
        loss = config(f"loss={name}").loss
        assert get_loss(name).name == name
        assert is_staged(loss)
        assert loss.order is None
    assert not is_staged(config("loss=dpo").loss)


def test_unknown_loss() -> None:
    with pytest.raises(
        UserError, match=r"unknown loss 'bfpx'; allowed: bfpo, bso, cdpo, dpo, .*; nearest: 'bfpo'"
    ):
        get_loss("bfpx")


def test_the_wanted_sign_is_the_labels() -> None:
    safe_w, safe_l = map(torch.tensor, zip(*CELLS, strict=True))
    batch = {"policy_w": torch.zeros(4), "safe_w": safe_w, "safe_l": safe_l}
    assert get_loss("dpo").wanted_sign(batch, {"beta": 1.0}).tolist() == [1, 1, 1, 1]
    values = {"beta": 1.0, "b1": 3.0}
    assert get_loss("bfpo").wanted_sign(batch, {**values, "alpha": 0.5}).tolist() == [1, 1, -1, -1]
    assert get_loss("bfpo").wanted_sign(batch, {**values, "alpha": 0.0}).tolist() == [1, 1, 0, -1]


@pytest.mark.parametrize("name", ["bfpo", "safedpo", "bso"])
@pytest.mark.parametrize("order", ["safety", "stream"])
def test_an_order_with_which_the_loss_means_something_else_is_refused(
    name: str, order: str, compose: Callable[..., DictConfig]
) -> None:
    with pytest.raises(UserError, match=rf"loss.order={order} is not allowed: loss {name} .* by helpfulness"):
        checked(compose(f"loss={name}", f"loss.order={order}"))


FILES = sorted(path.stem for path in (config_dir() / "loss").glob("*.yaml"))
COMMON = {"name", "order", "logps", "reference_free", "streams", "first"}


@pytest.mark.parametrize("file", FILES)
def test_a_losss_config_gives_exactly_its_hyperparameters(
    file: str, compose: Callable[..., DictConfig]
) -> None:
    given = compose(f"loss={file}").loss
    spec = get_loss(given.name)
    assert given.name == file
    assert set(given) - COMMON == set(spec.hyperparameters.model_fields)


def test_every_loss_has_a_config() -> None:
    assert set(LOSSES) == set(HYPERPARAMETERS)
    assert set(FILES) == {*LOSSES, *STAGED}
    assert not set(LOSSES) & set(STAGED)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=sacpo", "loss.first.beta=0"], r"loss\.first\.beta=0 is not allowed"),
        (
            ["loss=sacpo", "+loss.first.alpha=1"],
            r"unknown key in loss\.first 'alpha'; allowed: beta, first, ",
        ),
        (["loss=modpo", "loss.first=null"], r"loss\.first=null, but loss modpo needs the rewards"),
        (["loss=kto", "loss.reference_free=true"], "loss kto has no form without a reference"),
        (["loss=dpo", "loss.streams=[]"], r"loss\.streams=\[\] leaves nothing to train on"),
        (
            ["loss=sacpo", "data.streams=[helpfulness]", "data.batches=shuffle"],
            r"loss\.streams=\['safety'\], but the data mix has no stream 'safety'",
        ),
        (["loss=dpo", "loss.reference_free=maybe"], r"loss\.reference_free='maybe' is not allowed"),
        (["loss=dpo", "loss.first=dpo"], r"loss\.first='dpo' is not allowed"),
        (["loss=dpo", "loss.order=null"], r"loss\.order=null is not allowed: loss dpo .* by helpfulness or"),
        (["loss=steerlm", "loss.order=safety"], r"loss\.order=safety means nothing to loss steerlm"),
        (["loss=steerlm", "loss.logps=mean"], r"loss\.logps=mean means nothing to loss steerlm"),
        (["loss=steerlm", "loss.levels=5"], r"^loss: steer\.helpfulness=9, but levels=5 are 0 to 4$"),
        (
            ["loss=steerlm", "loss.template=' {safety}'"],
            r"loss\.template=' \{safety\}' is not allowed: a template",
        ),
        (["loss=steerlm", "loss.template=' {'"], r"loss\.template=' \{' is not allowed: it is no template"),
        (["loss=steerlm", "+loss.steer.safe=1"], r"unknown key in loss\.steer 'safe'; .* nearest: 'safety'"),
        (["loss=sacpo", "loss@loss.first=steerlm"], r"loss\.first\.order=helpfulness means nothing"),
    ],
)
def test_bad_input_ends_in_one_line(
    overrides: list[str], message: str, compose: Callable[..., DictConfig]
) -> None:
    with pytest.raises(UserError, match=message):
        checked(compose(*overrides))
