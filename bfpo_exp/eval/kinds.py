"""The kinds of tasks, by the name that a config gives."""

from __future__ import annotations

from collections.abc import Callable

from bfpo_exp.config.schema import Config, Eval, Task
from bfpo_exp.errors import UserError, unknown
from bfpo_exp.eval import pair_tasks, world_tasks
from bfpo_exp.eval.tasks import ChoiceTask, GenerationTask, HeldOut

KINDS: dict[str, Callable[[Task, Eval, HeldOut], GenerationTask | ChoiceTask]] = {
    "heldout_pairs": pair_tasks.heldout_pairs,
    "world_choice": world_tasks.choice,
    "world_harmless": world_tasks.harmless,
    "world_helpful": world_tasks.helpful,
    "world_over_refusal": world_tasks.over_refusal,
}


def check_tasks(config: Config) -> None:
    """A `UserError` for a kind of task that does not exist, or one without its data."""
    for name, task in config.eval.tasks.items():
        if task.kind not in KINDS:
            raise unknown(f"kind in eval.tasks.{name}", task.kind, KINDS)
        if task.kind == "heldout_pairs" and not config.data.heldout:
            raise UserError(
                f"eval.tasks.{name} ranks held-out pairs, but data.heldout=0 holds none out; set "
                "data.heldout=0.1, say, or choose another eval"
            )
