"""Multiple choice by log-likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.distributed import gathered, group
from bfpo_exp.eval.tasks import ChoiceTask
from bfpo_exp.logprobs.paths import LogpsPath

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = 32  # of a forward pass


@torch.no_grad()
def choose(
    model: PreTrainedModel,
    chat: ChatFormat,
    task: ChoiceTask,
    score: Literal["mean", "sum"],
    path: LogpsPath,
    progress: Callable[[int], None] = lambda done: None,
) -> list[int]:
    """For each prompt, the candidate with the highest log-likelihood, summed or per token.

    Passes are shared out over the processes, and every process gets all choices.
    """
    items = chat.encode_batch(task.prompts, task.candidates)
    order = sorted(
        range(len(items)),
        key=lambda i: len(items[i][0].prompt_ids) + max(len(c.response_ids) for c in items[i]),
    )
    chosen: list[tuple[int, int]] = []
    for start in group().share(range(0, len(order), PROMPTS)):
        part = order[start : start + PROMPTS]
        candidates = [[tokens.response_ids for tokens in items[i]] for i in part]
        rows = path.rows([items[i][0].prompt_ids for i in part], candidates, model.device)
        logps, counts = path.logps(model, rows)
        scores = logps / counts if score == "mean" else logps
        best = [int(several.argmax()) for several in scores.cpu().split([len(c) for c in candidates])]
        chosen += zip(part, best, strict=True)
        progress(group().size * len(part))
    of_prompt = dict(gathered(chosen))
    return [of_prompt[i] for i in range(len(items))]
