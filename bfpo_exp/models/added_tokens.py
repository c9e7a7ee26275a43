"""Words that a pretrained tokenizer lacks, as tokens of their own with embeddings that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOISE = 1.0  # of a new row, in standard deviations of the old rows


def add_words(tokenizer: Any, words: Sequence[str]) -> None:
    """Give the tokenizer a token for each of these words, behind those that it has.

    They are read where they stand between characters that are no letters, and are no control tokens.
    """
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])


def extend_embeddings(model: PreTrainedModel, size: int, seed: int) -> int:
    """Give the model rows for ``size`` tokens; returns how many it had.

    A new row is the mean of the old ones with noise around it, drawn from ``seed``; so are those of an
    output layer with a weight of its own.  A model with rows enough is left as it is.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if size <= old:
        return old
    model.resize_token_embeddings(size, mean_resizing=False)
    for weight in _tables(model):
        _fill(weight, old, torch.Generator().manual_seed(seed))
    return old


def train_new_rows(model: PreTrainedModel, old: int) -> None:
    """Have the rows from ``old`` on trained, and no others of these tables, whatever else is trained.

    To be called where the tables are frozen.  Their gradients are zero in the old rows, so that an
    optimiser without weight decay leaves these as they are.
    """

    def cleared(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:old] = 0
        return gradient

    for weight in _tables(model):
        weight.requires_grad_(True)
        weight.register_hook(cleared)


def _tables(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights with a row for each token: of the input, and of the output where it is another."""
    tables = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not tables[0]:
        tables.append(output.weight)
    return tables


@torch.no_grad()
def _fill(weight: Tensor, old: int, generator: torch.Generator) -> None:
    """The rows from ``old`` on: mean of the old ones, and noise of their spread in each dimension."""
    known = weight[:old].float()
    noise = torch.randn(weight[old:].shape, generator=generator).to(weight.device)
    weight[old:] = (known.mean(0) + NOISE * known.std(0) * noise).to(weight.dtype)
