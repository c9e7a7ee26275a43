"""What is measured: the shape of a random model, and pairs of random words in a chat format."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

MAX_LENGTH = 1024  # tokens of a prompt with one response; TRL's default
# What the template writes around a prompt (BOS, user, EOS, assistant) and around a response (EOS).
PROMPT_MARKS, RESPONSE_MARKS = 4, 1
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ ('<|user|>' if m['role'] == 'user' else '<|assistant|>') + m['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A model of random weights: the fields of its transformers config, its dtype, and where it runs."""

    fields: dict[str, Any]
    dtype: str
    device: str


SMALL = Shape(
    {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 8000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    dtype="float32",
    device="cpu",
)
# conf/model/mistral_7b.yaml
MISTRAL_7B = Shape(
    {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    dtype="bfloat16",
    device="cuda",
)


@dataclass(frozen=True)
class Profile:
    """Lengths in tokens, marks included: medians, and standard deviations of their logarithms.

    Attributes:
        prompt, response: the medians.
        prompt_spread: of prompts.
        pair_spread: of what the two responses of a pair have in common.
        spread: of what is a response's own.
    """

    prompt: float
    response: float
    prompt_spread: float
    pair_spread: float
    spread: float

    def scaled(self, factor: float) -> Profile:
        """The same with all medians times a factor."""
        return replace(self, prompt=factor * self.prompt, response=factor * self.response)


PROFILES = {
    "short safety prompts": Profile(15, 40, prompt_spread=0.6, pair_spread=0.5, spread=0.6),
    "UltraFeedback-like": Profile(110, 150, prompt_spread=0.9, pair_spread=0.5, spread=0.6),
    "long prompts": Profile(450, 100, prompt_spread=0.4, pair_spread=0.5, spread=0.6),
}


def lengths(profile: Profile, n: int, seed: int) -> np.ndarray:
    """Tokens of prompt, chosen and rejected response; int64 (n, 3), the sum of two at most `MAX_LENGTH`.

    The logarithms are quantiles in a random order, not random draws, so that few pairs stand for many.
    """
    rng = np.random.default_rng(seed)
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
    of_prompt, shared, of_chosen, of_rejected = (rng.permutation(quantiles) for _ in range(4))
    prompt = profile.prompt * np.exp(profile.prompt_spread * of_prompt)
    own = profile.spread * np.stack([of_chosen, of_rejected], axis=1)
    responses = profile.response * np.exp(profile.pair_spread * shared[:, None] + own)
    prompt = np.clip(np.rint(prompt), PROMPT_MARKS + 1, 3 * MAX_LENGTH // 4)[:, None]
    responses = np.clip(np.rint(responses), RESPONSE_MARKS + 1, MAX_LENGTH - prompt)
    return np.concatenate([prompt, responses], axis=1).astype(np.int64)


def write_rows(file: Path, profile: Profile, n: int, vocabulary: int, seed: int = 0) -> None:
    """A preference data set as JSON lines: texts of prompt, chosen and rejected, and two safety labels."""
    from bfpo_exp.models.tokenizers import SPECIAL

    rng = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(vocabulary - len(SPECIAL), size=count))

    with file.open("w") as out:
        for prompt, chosen, rejected in lengths(profile, n, seed).tolist():
            row = {
                "prompt": words(prompt - PROMPT_MARKS),
                "chosen": words(chosen - RESPONSE_MARKS),
                "rejected": words(rejected - RESPONSE_MARKS),
                "chosen_safe": bool(rng.integers(2)),
                "rejected_safe": bool(rng.integers(2)),
            }
            out.write(json.dumps(row) + "\n")


def write_model(folder: Path, shape: Shape, seed: int = 0) -> None:
    """A model of random weights, with a tokenizer of one token a word and `TEMPLATE`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from bfpo_exp.models.tokenizers import SPECIAL, word_tokenizer

    tokenizer = word_tokenizer(f"w{i}" for i in range(shape.fields["vocab_size"] - len(SPECIAL)))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    with torch.device(shape.device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                **shape.fields,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            dtype=getattr(torch, shape.dtype),
        )
    model.save_pretrained(folder)
    if shape.device == "cuda":  # what is measured next is to have all of its memory
        del model
        torch.cuda.empty_cache()
