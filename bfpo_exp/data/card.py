"""The data set's card: what every row became, for a reader and for the tracking server."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bfpo_exp.config.data import Data, Source
from bfpo_exp.data.demos import DemoMix
from bfpo_exp.data.mix import PairMix

Counts = Mapping[str, Mapping[str, int]]


def dataset_card(
    data: Data,
    pairs: PairMix,
    demos: DemoMix | None = None,
    tokens: Counts | None = None,
) -> str:
    """The card in Markdown.

    ``tokens`` holds the counts of `tokenise`, by what was tokenised ("pairs", "demonstrations").
    """
    parts = [f"# Data {data.name}", "", f"Fingerprint of the pairs `{pairs.fingerprint}`, seed {data.seed}."]
    ranker = data.ranker.kind + (f" ({data.ranker.model})" if data.ranker.kind == "model" else "")
    parts += [
        f"Helpfulness order where the data has none: {ranker}. Held-out share of prompts: {data.heldout}."
    ]
    parts += ["", "## Pairs", ""]
    for name, stream in pairs.streams.items():
        source = data.pairs[name]
        assumed = ", responses without label assumed safe" if source.assume_safe else ""
        parts.append(f"- `{name}` ({stream}{assumed}): {origin(source)}")
    parts += ["", table(pairs.counts, "source")]
    parts += [
        "",
        "Safety labels of (more helpful, less helpful) per stream; pairs that are not ordered "
        "count in the order of their source:",
        "",
        table(pairs.cells, "stream"),
    ]
    if demos is not None:
        parts += ["", "## Demonstrations", "", f"Fingerprint `{demos.fingerprint}`.", ""]
        parts += [
            f"- `{name}` (takes {data.sft[name].take}): {origin(data.sft[name])}" for name in demos.counts
        ]
        parts += ["", table(demos.counts, "source")]
    if tokens:
        parts += ["", "## Tokens", "", table(tokens, "of")]
    return "\n".join(parts) + "\n"


def card_metrics(
    pairs: PairMix, demos: DemoMix | None = None, tokens: Counts | None = None
) -> dict[str, float]:
    """The card's counts under flat names: ``data/<source>/<reason>``, ``data/cells/<stream>/<cell>``,

    ``data/sft/<source>/<reason>`` and ``data/tokens/<of>/<count>``, in letters that MLflow allows.
    """
    groups = {"data": pairs.counts, "data/cells": pairs.cells}
    if demos is not None:
        groups["data/sft"] = demos.counts
    if tokens is not None:
        groups["data/tokens"] = tokens  # type: ignore[assignment]
    return {
        f"{group}/{metric_name(name)}/{count}": float(value)
        for group, rows in groups.items()
        for name, counts in rows.items()
        for count, value in counts.items()
    }


def metric_name(name: str) -> str:
    """A name in the letters that metric names may have.

    >>> metric_name("pku:30k")
    'pku_30k'
    """
    return re.sub(r"[^A-Za-z0-9_\-. ]", "_", name)


def origin(source: Source) -> str:
    """Where a source's rows come from."""
    if source.files is not None:
        return f"reader {source.reader}, files {', '.join(source.files)}"
    if source.hub is not None:
        return f"reader {source.reader}, {source.hub} at {source.revision}, split {source.split}"
    return f"reader {source.reader}, generated"


def table(rows: Counts, head: str) -> str:
    """Counts as a Markdown table, a row for each name; what a row does not count is left blank."""
    columns = list(dict.fromkeys(column for counts in rows.values() for column in counts))
    lines = [f"| {' | '.join([head, *columns])} |", "|" + "---|" + "---:|" * len(columns)]
    for name, counts in rows.items():
        cells = [f"{counts[column]:,}" if column in counts else "" for column in columns]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)
