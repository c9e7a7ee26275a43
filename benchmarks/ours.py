"""Our side: the preference stage of a run, as ``bfpo-exp`` does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from benchmarks.cases import Case, Work
from benchmarks.gate import Gate, Over, Seen
from bfpo_exp.logprobs.reference import PairLogps, reference_logps
from bfpo_exp.stages import base, preference
from bfpo_exp.stages.base import base_model
from bfpo_exp.stages.preference import policy


def run(case: Case, work: Work, gate: Gate) -> Seen:
    """Train as the case says, until the gate's last repetition is over.

    The stage is the real one.  Only the bar of its training, which is told of every step, is replaced by
    the gate; and the reference pass, by one that is done twice, to time it when it is warm.
    """
    context, seen = work.context, Seen()

    @contextmanager
    def gated(what: str, total: int) -> Iterator[Callable[[int], None]]:
        gate.first_step()
        yield gate.step

    def timed(*arguments: Any) -> PairLogps:
        reference_logps(*arguments)
        started = time.perf_counter()
        found = reference_logps(*arguments)
        seen.reference_pairs_per_second = len(work.pairs) / (time.perf_counter() - started)
        return found

    base.progress = gated
    preference.reference_logps = timed  # type: ignore[assignment]
    with suppress(Over):
        policy(context, base_model(context))
    for record in context.metrics.read():
        if "train/loss" in record.metrics:
            seen.losses.append(record.metrics["train/loss"])
            seen.gradient_norms.append(record.metrics["train/gradient_norm"])
    return seen
