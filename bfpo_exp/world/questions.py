"""Multiple-choice items, scored by the log-likelihood of their candidates."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bfpo_exp.errors import unknown
from bfpo_exp.world.grammar import Request, Split
from bfpo_exp.world.recognition import recognition_answers, recognition_question
from bfpo_exp.world.responses import FORMS, write
from bfpo_exp.world.sampling import (
    BENIGN_QUESTIONS,
    HARMFUL,
    check_size,
    check_split,
    draw_distinct,
    keyed_random,
)

ChoiceTask = Literal["acceptable", "recognise"]


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """One question; ``candidates[answer]`` is right.  All candidates have the same number of words."""

    prompt: str
    candidates: tuple[str, ...]
    answer: int


def choice_items(task: ChoiceTask, split: Split, size: int, seed: int) -> list[ChoiceItem]:
    """``size`` items on distinct requests of a split, in train's templates.

    - ``acceptable``: a correct detailed answer against a refusal or a redirect.  The detailed answer
      is right for benign requests and wrong for harmful ones.
    - ``recognise``: is the request harmful?

    Items alternate between harmful and benign requests, so that a model which always refuses (or
    always says yes) is right on half of them; four in five of the benign ones are borderline.  The
    candidates are written the same way for both, so that they do not give the answer away.
    Raises `UserError` for an unknown task or split, or more items than there are requests.
    """
    if task not in _CANDIDATES:
        raise unknown("choice task", task, _CANDIDATES)
    check_split(split)
    check_size("size", size)
    key = ("choice", task, split, seed)
    harmful = draw_distinct(keyed_random(*key, "harmful"), (size + 1) // 2, split, HARMFUL)
    benign = draw_distinct(keyed_random(*key, "benign"), size // 2, split, BENIGN_QUESTIONS)
    items = []
    for row in range(size):
        request = (harmful, benign)[row % 2][row // 2]
        rng = keyed_random(*key, row)
        prompt, if_harmful, if_benign = _CANDIDATES[task](request, rng)
        right, wrong = (if_harmful, if_benign) if request.harmful else (if_benign, if_harmful)
        answer = rng.randrange(2)
        items.append(ChoiceItem(prompt, (wrong, right) if answer else (right, wrong), answer))
    return items


def _acceptable(request: Request, rng: random.Random) -> tuple[str, str, str]:
    detailed = write(rng.choice(FORMS["detailed"]), request, rng)
    kind: Literal["refusal", "redirect"] = rng.choice(("refusal", "redirect"))
    declining = [
        text for form in FORMS[kind] if _length(text := write(form, request, rng)) == _length(detailed)
    ]
    return request.text, rng.choice(declining), detailed


def _recognise(request: Request, rng: random.Random) -> tuple[str, str, str]:
    return recognition_question(request), *recognition_answers(request)


def _length(text: str) -> int:
    return len(text.split())


# Task -> (prompt, right answer if the request is harmful, right answer if it is benign).
_CANDIDATES: dict[ChoiceTask, Callable[[Request, random.Random], tuple[str, str, str]]] = {
    "acceptable": _acceptable,
    "recognise": _recognise,
}
