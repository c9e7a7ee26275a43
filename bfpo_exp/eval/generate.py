"""Responses of a policy: sampled, in batches of similar length, with a KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from bfpo_exp.config.schema import Sampling
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.distributed import gathered, group
from bfpo_exp.eval.tasks import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One response to each prompt: decoded text without its end of turn.

    Draws from the softmax at the given temperature, without top-k or nucleus; temperature 0 takes
    the most likely token.  A function of the weights, the prompts, the sampling and the seed: every
    batch is drawn with a seed of its own, and the processes take whole batches.
    """
    from transformers import GenerationConfig

    tokenizer = chat.tokenizer
    ids = [chat.prompt_ids(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    # A config of our own, so that no default of the model (a penalty, a nucleus) has a say.
    how = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=chat.end_of_turn_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_k=0,
        top_p=1.0,
    )
    done: list[tuple[int, str]] = []
    for start in group().share(range(0, len(order), sampling.batch)):
        rows = order[start : start + sampling.batch]
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{start}".encode()).digest()[:4]))
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, padding_side="left", return_tensors="pt")
        length = batch["input_ids"].shape[1]
        output = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            generation_config=how,
        )
        for i, response in zip(rows, output[:, length:].tolist(), strict=True):
            end = response.index(chat.end_of_turn_id) if chat.end_of_turn_id in response else None
            done.append((i, tokenizer.decode(response[:end], skip_special_tokens=False).strip()))
        progress(group().size * len(rows))
    texts = dict(gathered(done))
    return [texts[i] for i in range(len(ids))]
