"""Gradient checkpointing: the same gradients for fewer activations kept, and no dropout woken by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Config
from bfpo_exp.config.training import Optimisation
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.padded import PaddedRows, response_logps
from bfpo_exp.logprobs.paths import SHARED
from bfpo_exp.models.policy import select_trainable
from bfpo_exp.train.live_reference import live_reference
from bfpo_exp.train.prepare import check_compile, compile_blocks, prepare_for_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Families whose blocks apply dropout by different means; what is given here would be heard.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5},
    "mistral": {"attention_dropout": 0.5, "sliding_window": None},
    "qwen2": {"attention_dropout": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5},
}


@pytest.fixture
def asked(config: Callable[..., Config]) -> Callable[..., Optimisation]:
    return lambda checkpointing: config(f"train.gradient_checkpointing={str(checkpointing).lower()}").train


def rows_of(pairs: TokenisedPairs) -> PaddedRows:
    return PaddedRows.of(pairs.prompt_ids, pairs.w_ids)


def backward(model: PreTrainedModel, rows: PaddedRows) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and the bytes that are kept for the backward pass."""
    kept: dict[int, int] = {}  # by storage: views of one count once

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = response_logps(model, rows)[0].sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, sum(kept.values())


@pytest.mark.parametrize("trainable", ["all", "some"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_are_equal_and_less_is_kept(
    family: str,
    trainable: str,
    asked: Callable[..., Optimisation],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    rows, found = rows_of(random_pairs(8)), {}
    some = {"gpt2": ["mlp.c_proj"], "opt": ["fc2"]}.get(family, ["mlp.down_proj"])
    for checkpointing in (False, True):
        model = tiny_model(family, **FAMILIES[family])
        select_trainable(model, "all" if trainable == "all" else some)
        prepare_for_training(model, asked(checkpointing))
        found[checkpointing] = backward(model, rows)
    (loss, gradients, kept), (other, others, kept_of_other) = found[False], found[True]
    assert other == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    assert kept_of_other < 0.8 * kept
    if trainable == "some":  # nothing before the first trained weight asks for a gradient
        assert not model.get_input_embeddings()(rows.input_ids).requires_grad


def test_nothing_is_switched_on_unasked(
    asked: Callable[..., Optimisation], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model()
    prepare_for_training(model, asked(False))
    assert not any(module.training for module in model.modules())
    assert not model.is_gradient_checkpointing


def test_a_live_reference_of_a_checkpointing_model(
    asked: Callable[..., Optimisation],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    pairs, values = random_pairs(8), []
    rows = SHARED.rows(pairs.prompt_ids, list(zip(pairs.w_ids, pairs.l_ids, strict=True)), "cpu")
    for checkpointing in (False, True):
        model = tiny_model()
        select_trainable(model, ["mlp.down_proj"])
        prepare_for_training(model, asked(checkpointing))
        held = live_reference(model, SHARED)
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(1.5)
        values.append(held.logps(rows)[0])
    assert torch.equal(*values)


def test_a_model_without_blocks_is_refused(
    asked: Callable[..., Optimisation],
    tiny_model: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    monkeypatch.setattr(model.model, "layers", nn.ModuleList())
    with pytest.raises(UserError, match="gradient_checkpointing=true, but a model of type llama cannot"):
        prepare_for_training(model, asked(True))


# ---------------------------------------------------------------- compiled blocks


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_gradients(
    checkpointing: bool,
    asked: Callable[..., Optimisation],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    """Rows of several lengths, through one compilation."""
    found: list[list[Tensor]] = []
    for compiled in (False, True):
        model = tiny_model()
        select_trainable(model, ["mlp.down_proj"])
        prepare_for_training(model, asked(checkpointing))
        if compiled:
            compile_blocks(model)
        for seed in range(3):
            pairs = random_pairs(4, seed=seed)
            rows = SHARED.rows(pairs.prompt_ids, list(zip(pairs.w_ids, pairs.l_ids, strict=True)), "cpu")
            with SHARED.during(model):
                SHARED.logps(model, rows)[0].sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 2
    for gradient, other in zip(*found, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_what_cannot_be_compiled_is_refused(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"train\.compile=true, but the model has no blocks"):
        compile_blocks(nn.Linear(2, 2))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_compile(config().train)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler on a CPU, and no-such-compiler is not"):
        check_compile(config("train.compile=true").train)
