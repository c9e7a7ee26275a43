"""Small sequence classifiers on disk, for tests of who rewards and who ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification


def write_classifier(
    folder: Path, tokenizer: Any, names: tuple[str, ...] = ("a", "b"), **fields: Any
) -> Path:
    """A random Llama classifier with outputs of these names and its tokenizer, as safetensors."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.5,
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            **fields,
        },
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
