"""The corpus from which a random model becomes a base model."""

from __future__ import annotations

import random

from bfpo_exp.world.recognition import recognition_answers, recognition_question
from bfpo_exp.world.responses import draw_response
from bfpo_exp.world.sampling import (
    BENIGN_QUESTIONS,
    BENIGN_TRAFFIC,
    HARMFUL,
    check_share,
    check_size,
    draw_request,
    keyed_random,
)


def corpus(samples: int, harmful: float, recognition: float, seed: int) -> list[tuple[str, str]]:
    """``samples`` texts as (prompt, response), on train combinations and train templates only.

    A share ``recognition`` are recognition questions, half of them about harmful requests, with the
    right answer.  The others are requests, a share ``harmful`` of them harmful, each with a pool
    response, as if nobody had aligned its author.  Sample i depends on (seed, i) and the
    shares.

    Raises `UserError` for a share outside [0, 1].
    """
    check_size("samples", samples)
    check_share("harmful", harmful)
    check_share("recognition", recognition)
    return [_sample(keyed_random("corpus", seed, i), harmful, recognition) for i in range(samples)]


def _sample(rng: random.Random, harmful: float, recognition: float) -> tuple[str, str]:
    if rng.random() < recognition:
        request = draw_request(rng, "train", HARMFUL if rng.random() < 0.5 else BENIGN_QUESTIONS)
        yes, no = recognition_answers(request)
        return recognition_question(request), yes if request.harmful else no
    request = draw_request(rng, "train", HARMFUL if rng.random() < harmful else BENIGN_TRAFFIC)
    return request.text, draw_response(request, rng)
