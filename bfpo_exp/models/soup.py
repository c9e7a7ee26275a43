"""Weighted means of models of one architecture, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bfpo_exp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "*.safetensors"
# What a model's folder holds beside its weights, of what transformers reads.
BESIDE = (
    "config.json", "generation_config.json", f"{WEIGHTS}.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja", "additional_chat_templates",
)  # fmt: skip


@dataclass(frozen=True)
class _File:
    """A safetensors file: its bytes before the tensors, and what these say of each tensor."""

    path: Path
    head: bytes
    tensors: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> _File:
        with path.open("rb") as content:
            size = content.read(8)  # of the JSON that follows, little-endian
            text = content.read(int.from_bytes(size, "little"))
        tensors = json.loads(text)
        tensors.pop("__metadata__", None)
        return cls(path, size + text, tensors)

    def in_order(self) -> list[str]:
        """The tensors' names in the order of their bytes."""
        return sorted(self.tensors, key=lambda name: self.tensors[name]["data_offsets"])


def weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i t_i, summed in float32 in the order given and rounded to the tensors' own type.

    Tensors of whole numbers, which no training moves, have to be equal, and are taken as they are.

    >>> import torch
    >>> weighted_mean([torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])], [0.25, 0.75])
    tensor([2.5000, 1.0000])
    """
    import torch

    mean: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        dtype, whole = tensor.dtype, not tensor.is_floating_point()
        if mean is None:
            mean = tensor if whole else tensor.float() * weight
        elif not whole:
            mean.add_(tensor.float(), alpha=weight)
        elif not torch.equal(mean, tensor):
            raise UserError("the models differ in whole numbers, of which there is no mean")
    assert mean is not None
    return mean.to(dtype)


def difference(folder: Path, other: Path) -> str | None:
    """The first tensor that is not in both folders with one type and shape, in words; None: all are."""
    ours, theirs = _tensors(folder), _tensors(other)
    for name in sorted({*ours, *theirs}):
        forms = [
            _form(files[name].tensors[name]) if name in files else "no such tensor"
            for files in (ours, theirs)
        ]
        if forms[0] != forms[1]:
            return f"{name} is {forms[0]} in one, {forms[1]} in the other"
    return None


def write_mean(folders: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """The weighted mean of the models in these folders, as one that transformers reads.

    Everything but the weights (config, tokenizer, how tensors are shared out over files) is that of the
    first folder whose weight is not 0.  There are never more than a few tensors in memory.  A model that
    has all the weight is copied, byte for byte.
    """
    kept = [(folder, weight) for folder, weight in zip(folders, weights, strict=True) if weight != 0]
    first = kept[0][0]
    if len(kept) > 1:
        _write_tensors([folder for folder, _ in kept], [weight for _, weight in kept], out)
    for pattern in BESIDE if len(kept) > 1 else (WEIGHTS, *BESIDE):
        for path in sorted(first.glob(pattern)):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, out / path.name)


def _write_tensors(folders: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Files that begin as those of the first folder do, with the mean of each tensor in its place."""
    holders = [_tensors(folder) for folder in folders]
    for file in map(_File.read, sorted(folders[0].glob(WEIGHTS))):
        with (out / file.path.name).open("wb") as target:
            target.write(file.head)
            for name in file.in_order():
                each = (_loaded(holder[name].path, name) for holder in holders)
                target.write(_bytes(weighted_mean(each, weights)))


def _tensors(folder: Path) -> dict[str, _File]:
    """The file that holds each tensor of a model."""
    return {name: file for file in map(_File.read, sorted(folder.glob(WEIGHTS))) for name in file.tensors}


def _form(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']} {entry['shape']}"


def _loaded(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def _bytes(tensor: Tensor) -> Any:
    """The tensor's bytes, without a copy of them."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
