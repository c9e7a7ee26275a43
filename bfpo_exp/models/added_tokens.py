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


def extend_embeddings(model: PreTrainedModel, first: int, size: int, seed: int) -> None:
    """Give the model rows for ``size`` tokens, of which those from ``first`` on are new.

    A new row is the mean of the old ones with noise around it, drawn from ``seed``; so are those of an
    output layer with a weight of its own.  A table with rows to spare keeps its size.
    """
    if size > len(_tables(model)[0]):
        model.resize_token_embeddings(size, mean_resizing=False)
    for weight in _tables(model):
        _fill(weight, first, size, torch.Generator().manual_seed(seed))


def train_new_rows(model: PreTrainedModel, first: int) -> None:
    """Have the rows from ``first`` on trained, and no others of a table that was not to be trained.

    The gradients of its old rows are zero, so that an optimiser without weight decay leaves these as
    they are.
    """

    def cleared(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[:first] = 0
        return gradient

    for weight in _tables(model):
        if not weight.requires_grad:
            weight.requires_grad_(True)
            weight.register_hook(cleared)


def _tables(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights with a row for each token: of the input, and of the output where it is another."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    return list(tables.values())


@torch.no_grad()
def _fill(weight: Tensor, first: int, size: int, generator: torch.Generator) -> None:
    """The rows from ``first`` to ``size``: the mean of those before, and noise of their spread."""
    known = weight[:first].float()
    noise = torch.randn(weight[first:size].shape, generator=generator).to(weight.device)
    weight[first:size] = (known.mean(0) + NOISE * known.std(0) * noise).to(weight.dtype)
