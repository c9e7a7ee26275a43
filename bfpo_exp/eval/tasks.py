"""What a task is: prompts with a judge, or prompts with candidates of which one is right.

A new kind of task is a function that builds one of the two, listed in ``eval/kinds.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bfpo_exp.config.schema import Task
from bfpo_exp.data.records import PairRecord, Prompt
from bfpo_exp.errors import unknown

T = TypeVar("T")
Value = float | bool | str


@dataclass(frozen=True)
class GenerationTask:
    """Prompts that the policy answers in its own words.

    ``judge(i, response)`` gives the columns that are kept beside the response to prompt i; its
    ``score`` in [0, 1] is what the task averages.
    """

    prompts: Sequence[Prompt]
    judge: Callable[[int, str], Mapping[str, Value]]


@dataclass(frozen=True)
class ChoiceTask:
    """Prompts with candidate responses; right where the most likely one is the answer."""

    prompts: Sequence[Prompt]
    candidates: Sequence[Sequence[str]]
    answers: Sequence[int]


HeldOut = Callable[[], Sequence[PairRecord]]


def option(task: Task, name: str, allowed: Sequence[T]) -> T:
    """An option of a task's kind, which must be one of the allowed values."""
    value = task.options.get(name)
    if value not in allowed:
        raise unknown(f"{name} of a {task.kind} task", value, allowed)
    return allowed[allowed.index(value)]
