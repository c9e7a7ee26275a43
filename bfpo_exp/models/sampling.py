"""Responses as token ids, drawn from a model in batches of similar length, with a KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.distributed import gathered, group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_new_tokens: int,
    batch: int,
    seed: str,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The token ids of one response to each prompt, which is given as token ids.

    A response ends with the chat format's end of turn, or after ``max_new_tokens`` without it.  Draws from
    the softmax at the given temperature, without top-k or nucleus; temperature 0 takes the most likely
    token.  A function of the weights, the other arguments and the seed: every batch of so many prompts is
    drawn with a seed of its own, and the processes take whole batches.
    """
    from transformers import GenerationConfig

    tokenizer, end_of_turn = chat.tokenizer, chat.end_of_turn_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # A config of our own, so that no default of the model (a penalty, a nucleus) has a say.
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_of_turn,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0,
        top_p=1.0,
    )
    done: list[tuple[int, list[int]]] = []
    for start in group().share(range(0, len(order), batch)):
        rows = order[start : start + batch]
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{start}".encode()).digest()[:4]))
        padded = tokenizer.pad(
            {"input_ids": [list(prompts[i]) for i in rows]}, padding_side="left", return_tensors="pt"
        )
        length = padded["input_ids"].shape[1]
        output = model.generate(  # type: ignore[operator]
            input_ids=padded["input_ids"].to(model.device),
            attention_mask=padded["attention_mask"].to(model.device),
            generation_config=how,
        )
        for i, response in zip(rows, output[:, length:].tolist(), strict=True):
            ended = end_of_turn in response
            done.append((i, response[: response.index(end_of_turn) + 1] if ended else response))
        progress(group().size * len(rows))
    found = dict(gathered(done))
    return [found[i] for i in range(len(prompts))]
