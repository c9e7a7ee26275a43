"""Responses of a policy as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bfpo_exp.config.schema import Sampling
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.eval.tasks import Prompt
from bfpo_exp.models.sampling import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    model: PreTrainedModel,
    chat: ChatFormat,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One response to each prompt: decoded text without its end of turn, drawn as `sample` says."""
    responses = sample(
        model,
        chat,
        [chat.prompt_ids(prompt) for prompt in prompts],
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        batch=sampling.batch,
        seed=str(seed),
        progress=progress,
    )
    return [chat.text(response) for response in responses]
