"""What has to be switched on in a model before it is trained.

Models are trained in evaluation mode: no dropout of their own, so that policy and reference are the same
function at first, and a step does not depend on how it is cut into micro-batches.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import torch
from torch import nn

from bfpo_exp.config.training import Optimisation, Train
from bfpo_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare_for_training(model: PreTrainedModel, optimisation: Optimisation) -> None:
    """Switch on gradient checkpointing, if it is asked for, and the dropout of adapters.

    To be called on the model itself, adapters included, before an engine wraps it.  Gradient
    checkpointing (Chen et al., 2016) keeps the inputs of a block alone and computes what is inside once
    more in the backward pass: the same gradients for less memory and a third more work.

    Raises `UserError` for a model that cannot do it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and ".lora_dropout." in name:
            module.train()
    if optimisation.gradient_checkpointing:
        _checkpoint_blocks(model)


def compile_blocks(model: nn.Module) -> None:
    """Compile every block by itself (`torch.compile`), for rows of any length; the numbers stay, to rounding.

    Attention over shared prompts is left as it is: its kernels take segments of varying number.  Raises
    `UserError` for a model without blocks.
    """
    blocks = _blocks(model)
    if not blocks:
        raise UserError("train.compile=true, but the model has no blocks that can be compiled one by one")
    for block in blocks:
        block.compile(dynamic=True)


def check_compile(train: Train) -> None:
    """A `UserError` where ``train.compile`` cannot work: on a CPU, it needs a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if train.compile and not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise UserError(f"train.compile=true needs a C++ compiler on a CPU, and {compiler} is not installed")


def _blocks(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _checkpoint_blocks(model: PreTrainedModel) -> None:
    blocks = _blocks(model)
    if not blocks or not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing=true, but a model of type {model.config.model_type} cannot do it"
        )
    model.activation_checkpointing_enable({"use_reentrant": False})
    # It also asks for gradients of the embeddings' output, which only the reentrant kind needs.
    model.disable_input_require_grads()
    for block in blocks:
        # A block checkpoints only while it trains.  Its own flag says so, and its children stay in
        # evaluation mode; what dropout a block does by itself (OPT) must then be 0.
        block.training = True
        for name, value in vars(block).items():
            if "dropout" in name and isinstance(value, float):
                setattr(block, name, 0.0)
