"""The mix: every source read, cleaned, ranked, drawn from and split, with each row accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, concatenate_datasets

from bfpo_exp.config.data import Data, PairSource, Source
from bfpo_exp.data.clean import KEEP, REASONS, pair_reasons
from bfpo_exp.data.draw import draw_order, is_held_out, wanted
from bfpo_exp.data.rank import Scorer, make_scorer, rank, ranker_made_of
from bfpo_exp.data.staged import RECORD_CODE, stage_pairs, staged_from
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version, stable_hash

CELLS = ("safe_safe", "safe_unsafe", "unsafe_safe", "unsafe_unsafe")  # (more, less helpful)


@dataclass(frozen=True)
class PairMix:
    """The pairs of a mix, and what became of every row of its sources.

    ``records`` has `arrow.PAIR_FEATURES` (the canonical record).  ``counts`` holds for each source
    ``rows`` = the drop reasons of `clean.REASONS` + ``kept``; of those ``drawn`` by its size
    (``missing`` = asked for but not there, ``rank_tie`` = dropped as equal by the ranker), and
    ``taken`` = drawn and on this side of the held-out split = rows of ``records``.  Of the taken:
    ``ordered`` (helpfulness order known), ``safer`` (safer response known), ``labelled`` (both
    safety labels known).  ``cells`` holds per stream and in "total" the number of ``pairs``, of
    pairs in each cell of `CELLS` (more helpful, less helpful; a probability counts as safe from
    0.5), ``unlabelled`` (a label missing) and ``ordered``: where pairs are not ordered, the two
    mixed cells follow the order of the source.  ``streams`` maps each source to its stream.
    ``fingerprint`` is a hash of everything that determines the records.
    """

    records: Dataset
    counts: dict[str, dict[str, int]]
    cells: dict[str, dict[str, int]]
    streams: dict[str, str]
    fingerprint: str


def load_pairs(data: Data, heldout: bool = False) -> PairMix:
    """The pairs of the streams in use, on the training or on the held-out side of the split.

    Raises `UserError` for a source that cannot be read, or if a stream is left without pairs.
    """
    scorer = make_scorer(data.ranker)
    counts: dict[str, dict[str, int]] = {}
    parts: list[Dataset] = []
    sources = _used(data)
    for name, source in sources.items():
        pairs, counts[name] = _load_source(name, source, data, scorer, heldout)
        parts.append(pairs)
    for stream in data.streams:
        fed = {name: counts[name] for name, source in sources.items() if source.stream == stream}
        if not any(c["taken"] for c in fed.values()):
            raise UserError(f"no pairs are left for the stream {stream!r}: {tell(fed, data, heldout)}")
    records = concatenate_datasets(parts)
    return PairMix(
        records=records,
        counts=counts,
        cells=label_cells(records),
        streams={name: source.stream for name, source in sources.items()},
        fingerprint=pairs_fingerprint(data, heldout),
    )


def pairs_fingerprint(data: Data, heldout: bool = False) -> str:
    """`PairMix.fingerprint` without reading the rows (files are hashed, not parsed)."""
    return stable_hash(
        {
            "sources": {name: staged_from(name, source, data) for name, source in _used(data).items()},
            "draw": [data.seed, data.heldout, heldout],
            "ranker": ranker_made_of(data.ranker),
            "code": code_version(*RECORD_CODE),
        }
    )


def label_cells(records: Dataset) -> dict[str, dict[str, int]]:
    """Counts of the label cells per stream and in total; see `PairMix`."""
    table = records.select_columns(["stream", "safe_w", "safe_l", "ordered"]).to_pandas()
    labels = table[["safe_w", "safe_l"]].astype(float)
    safe = labels >= 0.5
    labelled = labels.notna().all(axis=1)
    counts = {}
    for stream in (*dict.fromkeys(table["stream"]), "total"):
        here = table["stream"].eq(stream) | (stream == "total")
        cell = {
            f"{'safe' if w else 'unsafe'}_{'safe' if l else 'unsafe'}": int(
                (here & labelled & (safe["safe_w"] == w) & (safe["safe_l"] == l)).sum()
            )
            for w in (True, False)
            for l in (True, False)  # noqa: E741
        }
        rest = {"unlabelled": here & ~labelled, "ordered": here & table["ordered"], "pairs": here}
        counts[stream] = cell | {name: int(mask.sum()) for name, mask in rest.items()}
    return counts


def tell(counts: Mapping[str, Mapping[str, int]], data: Data, heldout: bool = False) -> str:
    """Where the rows of sources went, for an error."""
    gone = "; ".join(
        f"source {name!r}: " + (", ".join(f"{what} {n:,}" for what, n in c.items() if n) or "0 rows")
        for name, c in counts.items()
    )
    return gone + (f"; data.heldout={data.heldout} is the share of held-out prompts" if heldout else "")


def _used(data: Data) -> dict[str, PairSource]:
    return {
        n: source for n, source in data.pairs.items() if source.stream in data.streams and source.size != 0
    }


def _load_source(
    name: str, source: Source, data: Data, scorer: Scorer | None, heldout: bool
) -> tuple[Dataset, dict[str, int]]:
    staged = stage_pairs(name, source, data)
    reasons = pair_reasons(staged)
    pairs, counts = draw_pairs(name, source.size, staged, np.flatnonzero(reasons == KEEP), data.seed, scorer)
    side = np.array([is_held_out(prompt, data.heldout) == heldout for prompt in pairs["prompt"]], bool)
    taken = pairs.select(np.flatnonzero(side))
    labels = taken.select_columns(["ordered", "safer", "safe_w", "safe_l"]).to_pandas()
    return taken, {
        **reason_counts(reasons, REASONS),
        **counts,
        "taken": len(taken),
        "ordered": int(labels["ordered"].sum()),
        "safer": int(labels["safer"].notna().sum()),
        "labelled": int(labels[["safe_w", "safe_l"]].notna().all(axis=1).sum()),
    }


def reason_counts(reasons: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    """Rows, dropped by each reason, and kept."""
    return {
        "rows": len(reasons),
        **{reason: int((reasons == reason).sum()) for reason in names},
        "kept": int((reasons == KEEP).sum()),
    }


def draw_pairs(
    name: str, size: int | float | None, staged: Dataset, usable: np.ndarray, seed: int, scorer: Scorer | None
) -> tuple[Dataset, dict[str, int]]:
    """A random subset of the usable rows, ranked: `arrow.PAIR_FEATURES`, and how it went."""
    asked = wanted(size, len(usable))
    pairs, ties = rank(staged, draw_order(usable, seed, name), asked, scorer)
    missing = asked - len(pairs) if isinstance(size, int) else 0
    return pairs, {"rank_tie": ties, "drawn": len(pairs), "missing": missing}
