"""Tiny models and made pairs, for tests and for the processes that they start."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bfpo_exp.data.pairs import TokenisedPairs

VOCABULARY, END_OF_TURN = 64, 2


def made_model(
    kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> PreTrainedModel:
    """A random model of two blocks, whose next-token distributions are far from uniform."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": END_OF_TURN,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    architecture = AutoConfig.for_model(kind, **{**sizes, **fields})
    return AutoModelForCausalLM.from_config(architecture, dtype=dtype).eval()


def made_pairs(n: int, seed: int = 0, longest: int = 24) -> TokenisedPairs:
    """Pairs of random tokens with every label known; responses are of very different lengths."""
    rng = np.random.default_rng(seed)

    def words(shortest: int, longest: int) -> list[int]:
        return rng.integers(3, VOCABULARY, rng.integers(shortest, longest)).tolist()

    return TokenisedPairs(
        prompt_ids=[[1, *words(1, 12)] for _ in range(n)],
        w_ids=[[*words(0, longest), END_OF_TURN] for _ in range(n)],
        l_ids=[[*words(0, longest), END_OF_TURN] for _ in range(n)],
        safe_w=rng.integers(0, 2, n).astype(np.float32),
        safe_l=rng.integers(0, 2, n).astype(np.float32),
        safer=rng.choice([-1, 1], n).astype(np.int8),
        ordered=np.ones(n, bool),
        stream=(np.arange(n) % 2).astype(np.int8),
    )
