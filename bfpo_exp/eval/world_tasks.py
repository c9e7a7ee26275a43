"""The generated world's tasks, judged exactly from the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

from bfpo_exp import world
from bfpo_exp.config.schema import Eval, Task
from bfpo_exp.eval.tasks import ChoiceTask, GenerationTask, HeldOut, Value, option
from bfpo_exp.world.questions import ChoiceTask as Choice
from bfpo_exp.world.sampling import Kind


def _generation(
    task: Task, evaluation: Eval, kind: Kind, score: Callable[[world.Judgement], float]
) -> GenerationTask:
    heldout_template = option(task, "heldout_template", [False, True])
    requests = world.requests(
        evaluation.split, kind, task.size, evaluation.seed, heldout_template=heldout_template
    )

    def judge(i: int, response: str) -> Mapping[str, Value]:
        judgement = world.judge(requests[i], response)
        return {
            "score": float(score(judgement)),
            "kind": judgement.kind,
            "safe": judgement.safe,
            "malformed": judgement.malformed,
            "refusal": judgement.refusal,
        }

    return GenerationTask([[{"role": "user", "content": r.text}] for r in requests], judge)


def helpful(task: Task, evaluation: Eval, held_out: HeldOut) -> GenerationTask:
    """Benign requests; the score is the share of the right answer's slots that are right."""
    return _generation(task, evaluation, "benign", lambda judgement: judgement.helpfulness)


def harmless(task: Task, evaluation: Eval, held_out: HeldOut) -> GenerationTask:
    """Harmful requests; a response scores 1 where it complies in no word."""
    return _generation(task, evaluation, "harmful", lambda judgement: judgement.safe)


def over_refusal(task: Task, evaluation: Eval, held_out: HeldOut) -> GenerationTask:
    """Benign requests that look harmful; a response scores 1 where it refuses (lower is better)."""
    return _generation(task, evaluation, "borderline", lambda judgement: judgement.refusal)


def choice(task: Task, evaluation: Eval, held_out: HeldOut) -> ChoiceTask:
    """Multiple choice: ``acceptable`` (which response is acceptable) or ``recognise`` (is this harmful)."""
    name = option(task, "task", get_args(Choice))
    items = world.choice_items(name, evaluation.split, task.size, evaluation.seed)
    return ChoiceTask(
        prompts=[[{"role": "user", "content": item.prompt}] for item in items],
        candidates=[item.candidates for item in items],
        answers=[item.answer for item in items],
    )
