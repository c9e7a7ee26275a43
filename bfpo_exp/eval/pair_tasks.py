"""Held-out preference pairs as a choice: is the better response the more likely one?"""

from __future__ import annotations

import numpy as np

from bfpo_exp.config.schema import Eval, Task
from bfpo_exp.errors import UserError
from bfpo_exp.eval.tasks import ChoiceTask, HeldOut, option


def heldout_pairs(task: Task, evaluation: Eval, held_out: HeldOut) -> ChoiceTask:
    """Pairs of prompts that training never saw, first the better response, then the other.

    ``order=helpfulness`` takes the pairs of which the data says which response is more helpful (a
    ranker is no judge), ``order=safety`` those of which it says which is safer.
    """
    order = option(task, "order", ["helpfulness", "safety"])
    records = held_out()
    if order == "helpfulness":
        better_first = [(r, True) for r in records if r["ordered"] and r["ranker"] == "data"]
    else:
        better_first = [(r, r["safer"] == "w") for r in records if r["safer"] is not None]
    if not better_first:
        raise UserError(f"no held-out pair has a known {order} order: this task has nothing to ask")
    drawn = np.random.default_rng(evaluation.seed).permutation(len(better_first))[: task.size]
    better_first = [better_first[i] for i in drawn]
    return ChoiceTask(
        prompts=[r["prompt"] for r, _ in better_first],
        candidates=[
            (r["response_w"], r["response_l"]) if first else (r["response_l"], r["response_w"])
            for r, first in better_first
        ],
        answers=[0] * len(better_first),
    )
