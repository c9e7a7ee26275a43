"""The published hyper-parameters of the paper (arXiv 2408.15313), which a plan sets a run's beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bfpo_exp.config.schema import Config

# Of the paper's Section 4.2 and its reference code.  `data.format` is the preference stage's.
PUBLISHED: Mapping[str, Any] = {
    "loss.beta": 0.01,
    "loss.b1": 3.0,
    "loss.alpha": 0.5,
    "train.trainable": ["mlp.down_proj"],
    "train.lr": 5e-7,
    "train.schedule": "cosine",
    "train.warmup": 0.1,
    "train.epochs": 1.0,
    "train.sft.trainable": ["mlp.down_proj"],
    "train.sft.lr": 5e-7,
    "train.sft.schedule": "cosine",
    "train.sft.warmup": 0.1,
    "train.sft.epochs": 1.0,
    "train.sft.packing": True,
    "train.sft.max_length": 2048,
    "data.format.max_length": 1024,
    "data.format.max_prompt_length": 512,
    "model.dtype": "bfloat16",
}


def beside_published(config: Config) -> list[tuple[str, Any, Any]]:
    """(key, the run's value, the published one) of every key that the run has and uses."""
    values = config.model_dump()
    unused = {
        "train.sft.": "sft" not in config.stages,
        "train.": "preference" not in config.stages,
        "loss.": "preference" not in config.stages,
    }
    rows = []
    for key, published in PUBLISHED.items():
        part = next((part for part in unused if key.startswith(part)), "")
        if part and unused[part]:
            continue
        node: Any = values
        for name in key.split("."):
            node = node.get(name, _ABSENT) if isinstance(node, dict) else _ABSENT
        if node is not _ABSENT:
            rows.append((key, node, published))
    return rows


_ABSENT = object()
