"""How many weights a model has, and how many a stage trains, counted on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from bfpo_exp.config.schema import Model
from bfpo_exp.config.training import Lora, Trainable
from bfpo_exp.models.policy import declared_architecture, select_trainable, without_weights
from bfpo_exp.models.tokenizers import SPECIAL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """What the memory of a model depends on.

    Attributes:
        parameters: all weights, those that are tied counted once.
        hidden, inner: widths of the residual stream and of the MLP.
        blocks: number of transformer blocks.
        vocabulary: entries of the output layer.
        positions: the longest sequence that the model knows; None where its config does not say.
    """

    parameters: int
    hidden: int
    inner: int
    blocks: int
    vocabulary: int
    positions: int | None


def known_shape(config: Model) -> tuple[Shape, PreTrainedModel] | None:
    """The model's shape, and the model without its weights; None where the config does not tell it.

    That is the case for a hub id without ``model.shape``.  Raises `UserError` for an architecture that
    transformers does not take.
    """
    architecture = declared_architecture(config, **_vocabulary(config))
    if architecture is None:
        return None
    # Weights are the same whatever the attention, which may be one that this machine does not have.
    model = without_weights(architecture, config.model_copy(update={"attention": "eager"}))
    return _shape(architecture, model), model


def _shape(architecture: PreTrainedConfig, model: PreTrainedModel) -> Shape:
    hidden = architecture.hidden_size
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=hidden,
        inner=getattr(architecture, "intermediate_size", None) or 4 * hidden,
        blocks=architecture.num_hidden_layers,
        vocabulary=architecture.vocab_size,
        positions=getattr(architecture, "max_position_embeddings", None),
    )


def _vocabulary(config: Model) -> dict[str, int]:
    """The vocabulary that a model of random weights gets with its tokenizer; BPE may end with fewer."""
    if config.architecture is None:
        return {}
    if config.tokenizer.kind == "bpe":
        assert config.tokenizer.vocab_size is not None
        return {"vocab_size": config.tokenizer.vocab_size}
    from bfpo_exp import world

    return {"vocab_size": len(SPECIAL) + len(list(world.vocabulary()))}


def trained_parameters(model: PreTrainedModel, trainable: Trainable, lora: Lora | None) -> int:
    """Weights that a stage trains: the chosen modules', or those of the adapters in their place."""
    if lora is None:
        return sum(p.numel() for p in select_trainable(model, trainable))
    return sum(
        lora.rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{end}") for end in lora.target)
    )
