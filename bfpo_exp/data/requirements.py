"""Does the data have what the loss trains on?  Checked from counts, before any compute."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Literal

from bfpo_exp.data.mix import PairMix
from bfpo_exp.errors import UserError

Order = Literal["helpfulness", "safety", "stream"]


def missing_labels(needs: Set[str], order: Order, mix: PairMix, loss: str = "this loss") -> None:
    """Raise `UserError` if the pairs lack the order, or labels, that a loss needs.

    ``needs`` holds "safety" if the loss reads the safety labels.  ``order`` is the one it trains
    on: "helpfulness" (every pair ordered by helpfulness), "safety" (every pair's safer response
    known), "stream" (each pair by what its stream is named after).
    """
    wants: dict[str, Callable[[str], str]] = {
        "helpfulness": lambda stream: "ordered",
        "safety": lambda stream: "safer",
        "stream": lambda stream: "ordered" if stream == "helpfulness" else "safer",
    }
    for source, counts in mix.counts.items():
        label = wants[order](mix.streams[source])
        if gap := _gap(counts, label, source):
            name = "helpfulness" if label == "ordered" else "safety"
            raise UserError(f"loss {loss} trains on {name} order, but {gap}; {_cure(label, order)}")
        if "safety" in needs and (gap := _gap(counts, "labelled", source)):
            raise UserError(
                f"loss {loss} needs the safety labels of both responses, but {gap}; "
                f"set data.pairs.{source}.assume_safe=true or use a source with labels"
            )


def _gap(counts: dict[str, int], label: str, source: str) -> str | None:
    lacking = counts["taken"] - counts[label]
    if not lacking:
        return None
    return f"{lacking:,} of {counts['taken']:,} pairs of source {source!r} have none"


def _cure(label: str, order: Order) -> str:
    if label == "ordered":
        supply = "supply it with data.ranker.kind=column|model|longer"
        return f"{supply}, or choose a loss with loss.order=stream" if order == "helpfulness" else supply
    if order == "safety":
        return "use sources that say which response is safer, or choose a loss with loss.order=stream"
    return "use a safety source that says which response is safer"
