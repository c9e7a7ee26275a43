"""Adapters: nothing at first, nothing to the reference, and gone from what is saved."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bfpo_exp.config.schema import Config
from bfpo_exp.config.training import Lora
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.paths import SHARED, Rows
from bfpo_exp.logprobs.reference import reference_logps
from bfpo_exp.models.lora import add_lora, check_lora, merged
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.train.engine import PlainEngine
from bfpo_exp.train.live_reference import AdapterOff, live_reference
from bfpo_exp.train.loop import train
from bfpo_exp.train.preference import PreferenceObjective
from bfpo_exp.train.prepare import prepare_for_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bfpo_exp.logprobs.reference import PairLogps
    from bfpo_exp.train.live_reference import Reference

pytest.importorskip("peft", reason="peft is not installed")

LORA = Lora(rank=4, alpha=8, dropout=0.0, target=["q_proj", "mlp.down_proj"])
STEPS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The last bits of numbers do not depend on the machine."""
    with cpu_threads(1):
        yield


def rows_of(pairs: TokenisedPairs) -> Rows:
    return SHARED.rows(pairs.prompt_ids, list(zip(pairs.w_ids, pairs.l_ids, strict=True)), "cpu")


def trained(
    model: PreTrainedModel, pairs: TokenisedPairs, reference: PairLogps | None, run: Config
) -> tuple[list[dict[str, float]], Any, Reference]:
    """What each step logs; the model with its adapters, and its reference, at the end."""
    log: list[dict[str, float]] = []
    adapted = add_lora(copy.deepcopy(model), LORA, seed=0)
    prepare_for_training(adapted, run.train)  # type: ignore[arg-type]
    live = live_reference(adapted, SHARED)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    engine = PlainEngine(adapted, parameters, run.train, STEPS)

    def on_log(taken: int, values: Mapping[str, float]) -> None:
        log.append(dict(values))

    with SHARED.during(adapted):
        train(engine, PreferenceObjective(pairs, reference or live, run, "cpu"), STEPS, 1, on_log)
    return log, adapted, live


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_the_model_with_its_adapters_off(
    checkpointing: bool,
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    model, pairs = tiny_model(), random_pairs(40)
    run = preference_config(
        "bfpo", train__lr=1e-2, train__microbatch=4, train__gradient_checkpointing=checkpointing
    )
    cached, _, _ = trained(model, pairs, reference_logps(model, pairs, SHARED), run)
    live, adapted, reference = trained(model, pairs, None, run)
    assert cached[0]["loss"] != pytest.approx(cached[-1]["loss"], rel=1e-3)
    assert live[0]["kl"] == 0.0
    for expected, values in zip(cached, live, strict=True):
        assert values["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert values["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)

    assert isinstance(reference, AdapterOff)
    rows = rows_of(pairs)
    with torch.no_grad():
        start, moved = SHARED.logps(model, rows)[0], SHARED.logps(adapted, rows)[0]
    torch.testing.assert_close(reference.logps(rows)[0], start, rtol=1e-5, atol=0)
    assert ((moved - start) / start).abs().max() > 1e-3
    with torch.no_grad():  # the adapters are on again
        assert torch.equal(SHARED.logps(adapted, rows)[0], moved)


def test_adapters_alone_are_trained(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Two blocks, two matrices each, two thin factors of rank 4 each."""
    adapted = add_lora(tiny_model(), LORA, seed=0)
    free = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(free) == 2 * 2 * 2
    assert all(".lora_" in name for name in free)
    # q_proj is 32 -> 32 and down_proj 48 -> 32
    assert sum(p.numel() for p in free.values()) == 2 * 4 * ((32 + 32) + (48 + 32))


def test_adapters_are_a_function_of_the_seed(tiny_model: Callable[..., PreTrainedModel]) -> None:
    one, same, other = (add_lora(tiny_model(), LORA, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(same[name], weight) for name, weight in one.items())
    assert any(not torch.equal(other[name], weight) for name, weight in one.items() if "lora_A" in name)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_is_a_plain_model_with_the_adapters_in_its_weights(
    tied: bool,
    tmp_path: Path,
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    from transformers import AutoModelForCausalLM

    model, pairs = tiny_model(tie_word_embeddings=tied), random_pairs(24)
    _, adapted, _ = trained(model, pairs, None, preference_config("dpo", train__lr=1e-2))
    rows = rows_of(pairs)
    with torch.no_grad():
        expected, _ = SHARED.logps(adapted, rows)
    weights = merged(adapted.state_dict(), LORA)
    assert weights.keys() == model.state_dict().keys()
    adapted.unload().save_pretrained(tmp_path, state_dict=weights)
    assert not list(tmp_path.glob("adapter*"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found, _ = SHARED.logps(loaded, rows)
        start, _ = SHARED.logps(model, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, start, rtol=1e-3)


def test_merged_weights_are_pefts_own(tiny_model: Callable[..., PreTrainedModel]) -> None:
    adapted = add_lora(tiny_model(), LORA, seed=0)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ours = merged({name: tensor.clone() for name, tensor in adapted.state_dict().items()}, LORA)
    for name, tensor in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


def test_adapters_of_a_bfloat16_model_are_float32(tiny_model: Callable[..., PreTrainedModel]) -> None:
    adapted = add_lora(tiny_model(dtype=torch.bfloat16), LORA, seed=0)
    kinds = {p.requires_grad: p.dtype for p in adapted.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    weights = merged(adapted.state_dict(), LORA)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_dropout_of_adapters_is_on_while_they_train_and_no_other(
    config: Callable[..., Config], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    adapted = add_lora(tiny_model(), LORA.model_copy(update={"dropout": 0.5}), seed=0)
    assert not any(module.training for module in adapted.modules())
    prepare_for_training(adapted, config().train)  # type: ignore[arg-type]
    on = [name for name, module in adapted.named_modules() if module.training]
    assert len(on) == 2 * 2
    assert all("lora_dropout" in name for name in on)


# ---------------------------------------------------------------- settings


def test_settings(config: Callable[..., Config]) -> None:
    assert config().train.lora is None
    lora = config("train=lora", "train.lora.rank=4", "train.lora.target=[down_proj]").train.lora
    assert lora is not None
    assert (lora.rank, lora.target) == (4, ["down_proj"])
    check_lora(lora, config().model)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.lora.rank=0", "train.lora.rank=0"),
        ("train.lora.dropout=1", "train.lora.dropout=1"),
        ("train.lora.target=[]", r"train.lora.target=\[\]"),
    ],
)
def test_values_that_are_not_allowed(word: str, said: str, config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=said):
        config("train=lora", word)


def test_targets_are_linear_modules(
    config: Callable[..., Config], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    def asked(target: str) -> Lora:
        return LORA.model_copy(update={"target": [target]})

    with pytest.raises(UserError, match=r"train.lora.target 'down_prj'.*nearest: 'down_proj'"):
        check_lora(asked("down_prj"), config().model)
    with pytest.raises(UserError, match="'norm'"):
        check_lora(asked("norm"), config().model)
    add_lora(tiny_model(tie_word_embeddings=False), asked("lm_head"), seed=0)
    with pytest.raises(UserError, match="'lm_head'"):  # to merge it would change the embeddings
        add_lora(tiny_model(tie_word_embeddings=True), asked("lm_head"), seed=0)


def test_without_peft_one_line_says_so(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"train\.lora needs peft: pip install peft"):
        check_lora(LORA, config().model)
