"""Multiple choice by log-likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.distributed import group, sum_
from bfpo_exp.eval.tasks import ChoiceTask
from bfpo_exp.logprobs.padded import PaddedRows, response_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def choose(
    model: PreTrainedModel,
    chat: ChatFormat,
    task: ChoiceTask,
    score: Literal["mean", "sum"],
    rows: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[int]:
    """For each prompt, the candidate with the highest log-likelihood, summed or per token.

    Passes are shared out over the processes, and every process gets all choices.
    """
    flat = [
        (i, chat.encode(prompt, candidate))
        for i, (prompt, candidates) in enumerate(zip(task.prompts, task.candidates, strict=True))
        for candidate in candidates
    ]
    order = sorted(range(len(flat)), key=lambda j: len(flat[j][1].prompt_ids) + len(flat[j][1].response_ids))
    scores = torch.zeros(len(flat), device=model.device)
    for start in group().share(range(0, len(order), rows)):
        part = order[start : start + rows]
        tokens = [flat[j][1] for j in part]
        batch = PaddedRows.of([t.prompt_ids for t in tokens], [t.response_ids for t in tokens], model.device)
        logps, counts = response_logps(model, batch)
        scores[part] = logps / counts if score == "mean" else logps
        progress(group().size * len(part))
    scores = sum_(scores).cpu()  # each candidate's is 0 in all processes but one
    chosen, start = [], 0
    for candidates in task.candidates:
        chosen.append(int(scores[start : start + len(candidates)].argmax()))
        start += len(candidates)
    return chosen
