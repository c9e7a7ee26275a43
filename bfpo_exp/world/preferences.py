"""Preference pairs of the two streams, with the flaws that real preference data have."""

from __future__ import annotations

import math
import random
from typing import Literal

from bfpo_exp.data.records import PairRecord
from bfpo_exp.errors import unknown
from bfpo_exp.world.grammar import Split
from bfpo_exp.world.judging import Judgement, judge
from bfpo_exp.world.responses import draw_response
from bfpo_exp.world.sampling import (
    BENIGN_TRAFFIC,
    HARMFUL,
    check_share,
    check_size,
    check_split,
    draw_request,
    keyed_random,
)

Stream = Literal["helpfulness", "safety"]
STREAMS: tuple[Stream, ...] = ("helpfulness", "safety")
BRADLEY_TERRY_SCALE = 0.15


def pairs(
    stream: Stream, size: int, seed: int, unscreened: float, label_noise: float, split: Split = "train"
) -> list[PairRecord]:
    """``size`` pairs of a stream: two different pool responses to one request, ranked and labelled.

    The more helpful response is drawn by Bradley-Terry on the judge's helpfulness, with scale
    `BRADLEY_TERRY_SCALE`.

    - ``helpfulness``: benign requests, everything labelled safe.  A share ``unscreened`` are
      harmful requests labelled safe all the same: nobody screened them for safety.
    - ``safety``: harmful requests; the labels are the judge's, each flipped with probability
      ``label_noise``.  ``safer`` follows the labels: the safe one; of two unsafe ones the less
      detailed; of two safe ones, or two as detailed, either.

    Row i depends on (stream, split, seed, i); ``unscreened`` and ``label_noise`` change only the
    rows that they touch.  Raises `UserError` for a name or a share that is not allowed.
    """
    if stream not in STREAMS:
        raise unknown("stream", stream, STREAMS)
    check_split(split)
    check_size("size", size)
    check_share("unscreened", unscreened)
    check_share("label_noise", label_noise)
    return [
        _pair(keyed_random("pairs", stream, split, seed, row), stream, split, row, unscreened, label_noise)
        for row in range(size)
    ]


def _pair(
    rng: random.Random, stream: Stream, split: Split, row: int, unscreened: float, label_noise: float
) -> PairRecord:
    harmful = rng.random() < unscreened or stream == "safety"
    request = draw_request(rng, split, HARMFUL if harmful else BENIGN_TRAFFIC)
    first = second = draw_response(request, rng)
    while second == first:
        second = draw_response(request, rng)
    ranked = _by_helpfulness(rng, (first, judge(request, first)), (second, judge(request, second)))
    (response_w, judgement_w), (response_l, judgement_l) = ranked

    safe_w = safe_l = 1.0
    safer: Literal["w", "l"] | None = None
    if stream == "safety":
        safe_w = float(judgement_w.safe != (rng.random() < label_noise))
        safe_l = float(judgement_l.safe != (rng.random() < label_noise))
        safer = _safer(rng, (safe_w, _detail(judgement_w)), (safe_l, _detail(judgement_l)))
    return PairRecord(
        prompt=[{"role": "user", "content": request.text}],
        response_w=response_w,
        response_l=response_l,
        ordered=True,
        ranker="data",
        safe_w=safe_w,
        safe_l=safe_l,
        safer=safer,
        stream=stream,
        source="world",
        row=row,
    )


_Judged = tuple[str, Judgement]


def _by_helpfulness(rng: random.Random, a: _Judged, b: _Judged) -> tuple[_Judged, _Judged]:
    """The two responses, the more helpful first: P(a first) = sigmoid((help(a) - help(b)) / scale)."""
    gap = (a[1].helpfulness - b[1].helpfulness) / BRADLEY_TERRY_SCALE
    return (a, b) if rng.random() < 1 / (1 + math.exp(-gap)) else (b, a)


def _detail(judgement: Judgement) -> float:
    """How much a response gives away of what a harmful request asks for."""
    return 0.0 if judgement.refusal else judgement.helpfulness


def _safer(rng: random.Random, w: tuple[float, float], other: tuple[float, float]) -> Literal["w", "l"]:
    """Which of two (safety label, detail) is safer: the first, "w", or the other, "l"."""
    coin: Literal["w", "l"] = "w" if rng.random() < 0.5 else "l"
    (safe_w, detail_w), (safe_l, detail_l) = w, other
    if safe_w != safe_l:
        return "w" if safe_w > safe_l else "l"
    if safe_w or detail_w == detail_l:
        return coin
    return "w" if detail_w < detail_l else "l"
