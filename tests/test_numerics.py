"""Dtype and attention: what is chosen on which hardware, and what bfloat16 does to log-probs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bfpo_exp.config.schema import Config, Model
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.padded import PaddedRows, response_logps
from bfpo_exp.logprobs.paths import SHARED
from bfpo_exp.logprobs.reference import reference_logps
from bfpo_exp.models import numerics
from bfpo_exp.models.numerics import Hardware, chosen_attention, resolved_attention, tell_numerics
from bfpo_exp.models.policy import architecture, check_model, load_policy
from bfpo_exp.train.preference import PreferenceObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = Hardware(None, bf16=True, flash_attn="not looked for")
H100 = Hardware((9, 0), bf16=True, flash_attn=None)
BARE_H100 = Hardware((9, 0), bf16=True, flash_attn="flash_attn is not installed")
T4 = Hardware((7, 5), bf16=False, flash_attn=None)


@pytest.fixture
def model(config: Callable[..., Config]) -> Callable[..., Model]:
    def changed(**changes: Any) -> Model:
        return Model.model_validate(config().model.model_dump() | changes)

    return changed


@pytest.mark.parametrize(
    ("attention", "dtype", "hardware", "chosen"),
    [
        ("auto", "bfloat16", H100, "flash_attention_2"),
        ("auto", "float32", H100, "sdpa"),
        ("auto", "bfloat16", BARE_H100, "sdpa"),
        ("auto", "bfloat16", T4, "sdpa"),
        ("auto", "bfloat16", CPU, "sdpa"),
        ("sdpa", "bfloat16", H100, "sdpa"),
        ("eager", "bfloat16", H100, "eager"),
        ("flash_attention_2", "bfloat16", H100, "flash_attention_2"),
    ],
)
def test_attention_by_hardware(
    attention: str, dtype: str, hardware: Hardware, chosen: str, model: Callable[..., Model]
) -> None:
    assert chosen_attention(model(attention=attention, dtype=dtype), hardware)[0] == chosen


@pytest.mark.parametrize(
    ("dtype", "hardware", "words"),
    [
        ("bfloat16", CPU, "there is no CUDA device"),
        ("bfloat16", BARE_H100, "flash_attn is not installed"),
        ("bfloat16", T4, "the CUDA device has compute capability 7.5"),
        ("float32", H100, "model.dtype is float32"),
    ],
)
def test_flash_attention_where_it_cannot_work_is_refused(
    dtype: str, hardware: Hardware, words: str, model: Callable[..., Model]
) -> None:
    with pytest.raises(UserError, match=rf"flash_attention_2 cannot work here: {words}.*use auto, sdpa or"):
        chosen_attention(model(attention="flash_attention_2", dtype=dtype), hardware)


def test_what_this_machine_does_not_have_is_refused_before_anything_is_loaded(
    model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "this_hardware", lambda: T4)
    with pytest.raises(UserError, match=r"capability 7\.5.*use model\.dtype=float32"):
        check_model(model(dtype="bfloat16"))
    with pytest.raises(UserError, match="flash_attention_2 cannot work here"):
        check_model(model(attention="flash_attention_2"))
    check_model(model())


@pytest.mark.parametrize(
    ("hardware", "said"),
    [
        (BARE_H100, ["attention: sdpa (no flash_attention_2: flash_attn is not installed)"]),
        (
            CPU,
            [
                "attention: sdpa (no flash_attention_2: there is no CUDA device)",
                "model.dtype=bfloat16 on a CPU works but is slow; float32 is the faster one on most",
            ],
        ),
    ],
)
def test_what_was_chosen_is_said_once(
    hardware: Hardware,
    said: list[str],
    model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(numerics, "this_hardware", lambda: hardware)
    numerics.say.cache_clear()
    with caplog.at_level(logging.INFO, logger=numerics.__name__):
        for _ in range(3):
            tell_numerics(model(attention="auto", dtype="bfloat16"))
        tell_numerics(model())
    assert [record.message for record in caplog.records] == said
    assert resolved_attention(model(attention="auto", dtype="bfloat16")) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_auto_on_this_gpu_runs(
    model: Callable[..., Model], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    chosen = resolved_attention(model(attention="auto", dtype="bfloat16"))
    on_gpu = tiny_model(dtype=torch.bfloat16).to("cuda")
    on_gpu.set_attn_implementation(chosen)
    rows = PaddedRows.of([[1, 5], [1, 6, 7, 8]], [[9, 2], [10, 11, 2]], "cuda")
    assert torch.isfinite(response_logps(on_gpu, rows)[0]).all()


# ---------------------------------------------------------------- the shape that a config declares


def folder_of(tiny: PreTrainedModel, path: Path) -> Path:
    tiny.save_pretrained(path)
    return path


def test_a_declared_shape_is_held_to_the_weights(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], model: Callable[..., Model]
) -> None:
    own = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    pretrained = {"path": str(folder_of(tiny_model(), tmp_path)), "architecture": None}
    assert architecture(model(**pretrained, shape=own)).hidden_size == 32
    with pytest.raises(UserError, match=r"model\.shape\.hidden_size=4096, but the model at .* has 32"):
        architecture(model(**pretrained, shape=own | {"hidden_size": 4096}))
    with pytest.raises(UserError, match=r"model\.shape\.model_type=mistral.* has llama"):
        architecture(model(**pretrained, shape=own | {"model_type": "mistral"}))


@pytest.mark.parametrize("name", ["mistral_7b", "zephyr_7b_beta", "llama3_8b", "qwen"])
def test_the_named_models_are_bfloat16_with_a_declared_shape(
    name: str, config: Callable[..., Config]
) -> None:
    run = config(f"model={name}").model
    assert (run.dtype, run.attention, run.trust_remote_code) == ("bfloat16", "auto", False)
    assert run.path is not None
    assert run.shape is not None


def test_a_shape_without_weights_is_refused(model: Callable[..., Model]) -> None:
    with pytest.raises(ValueError, match="shape declares the config of pretrained weights"):
        model(shape={"model_type": "llama"})


def test_load_policy_gives_the_dtype_that_is_asked_for(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], model: Callable[..., Model]
) -> None:
    path = folder_of(tiny_model(), tmp_path)
    loaded = load_policy(path, model(dtype="bfloat16"), own=True, device=torch.device("cpu"))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------- bfloat16


def test_log_probs_of_a_bfloat16_model_are_float32_and_near(
    tiny_model: Callable[..., PreTrainedModel], random_pairs: Callable[..., TokenisedPairs]
) -> None:
    """A bfloat16 has 8 bits, 2^-8 relative: of a logit of size 5 that is 0.02 nats."""
    pairs = random_pairs(64)
    rows = PaddedRows.of(pairs.prompt_ids, pairs.w_ids)
    exact = tiny_model()
    with torch.no_grad():
        expected, counts = response_logps(exact, rows)
        found, _ = response_logps(exact.to(torch.bfloat16), rows)
    assert found.dtype == torch.float32
    off = (found - expected).abs() / counts
    assert 1e-4 < off.mean() < 0.02, "of bfloat16's size, and no larger"
    assert off.max() < 0.15


@pytest.mark.parametrize("loss", ["dpo", "ipo", "bfpo"])
def test_step_zero_in_bfloat16(
    loss: str,
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
    preference_config: Callable[..., Config],
) -> None:
    """The first step's loss is that at policy == reference, up to the rounding of other batch shapes."""
    pairs, policy = random_pairs(64), tiny_model(dtype=torch.bfloat16)
    run = preference_config(loss)
    objective = PreferenceObjective(pairs, reference_logps(policy, pairs, SHARED), run, "cpu")
    total = at_reference = 0.0
    for step in range(4):
        for batch in objective.microbatches(step):
            with torch.no_grad():
                value, sums = objective.loss(policy, batch)
            total += value.item()
            at_reference += sums.read()["loss_at_reference"]
    assert value.dtype == torch.float32
    if loss == "dpo":
        assert at_reference / 4 == pytest.approx(math.log(2), rel=1e-6)
    assert total == pytest.approx(at_reference, rel=1e-2)
