"""Low-rank adapters (LoRA; Hu et al., 2022, arXiv 2106.09685) through peft, an optional dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bfpo_exp.config.schema import Model
from bfpo_exp.config.training import Lora
from bfpo_exp.errors import UserError, unknown

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

INSTALL = "pip install peft"
PREFIX, BASE = "base_model.model.", ".base_layer.weight"  # what peft adds to names


def check_lora(lora: Lora, config: Model) -> None:
    """A `UserError` where peft is missing, or the model lacks a target; loads no weights."""
    from transformers import AutoModelForCausalLM

    from bfpo_exp.models.policy import architecture

    _peft_is_there()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture(config), trust_remote_code=config.trust_remote_code
        )
    _check_targets(model, lora.target)


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """The model with adapters on its linear modules, which alone are trained.

    A is drawn from ``seed``, B is 0: the model is unchanged at first.  Adapters of a bfloat16 model are
    float32.  Raises `UserError` where peft is missing or the model lacks a target.
    """
    _peft_is_there()
    _check_targets(model, lora.target)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a scale: fractions are as good
        lora_dropout=lora.dropout,
        target_modules=list(lora.target),
    )
    torch.manual_seed(seed)
    return get_peft_model(model, config).eval()


def merged(weights: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The plain model's weights, W + alpha / rank B A, of those of a model with adapters, by name.

    Sums are taken in float32 and rounded to the type of W: what a bfloat16 model becomes is near to what
    was trained, not equal to it.
    """
    plain = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        if name.endswith(BASE):
            stem = name.removesuffix(BASE)
            a, b = (weights[f"{stem}.lora_{part}.default.weight"].float() for part in "AB")
            weight = (weight.float() + lora.alpha / lora.rank * (b @ a)).to(weight.dtype)
        plain[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = weight
    return plain


def _peft_is_there() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(f"train.lora needs peft: {INSTALL}; or set train.lora=null") from None


def _check_targets(model: PreTrainedModel, target: Sequence[str]) -> None:
    """Every suffix names a linear module; an output layer that shares the embeddings' weight is none."""
    shared = model.get_input_embeddings().weight
    linear = [
        name.split(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not shared
    ]
    suffixes = {".".join(parts[i:]) for parts in linear for i in range(len(parts))}
    for given in target:
        if given not in suffixes:
            leaves = {name for name in suffixes if not any(part.isdigit() for part in name.split("."))}
            raise unknown("linear module in train.lora.target", given, leaves)
