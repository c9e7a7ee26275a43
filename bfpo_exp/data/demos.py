"""Demonstrations for supervised fine-tuning: conversations, or one response of a preference pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from bfpo_exp.config.data import Data, SftSource
from bfpo_exp.data.arrow import DEMO_FEATURES, derive
from bfpo_exp.data.clean import DEMO_REASONS, KEEP, REASONS, demo_reasons, pair_reasons
from bfpo_exp.data.draw import draw_order, is_held_out, wanted
from bfpo_exp.data.mix import draw_pairs, reason_counts, tell
from bfpo_exp.data.rank import make_scorer, ranker_made_of
from bfpo_exp.data.readers import DEMO_READERS
from bfpo_exp.data.staged import RECORD_CODE, stage_demos, stage_pairs, staged_from
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version, stable_hash


@dataclass(frozen=True)
class DemoMix:
    """The demonstrations of a mix, none of them on a held-out prompt.

    ``records`` has `arrow.DEMO_FEATURES`.  ``counts`` is that of `mix.PairMix` for each source,
    where ``no_choice`` counts pairs that do not say which response to take, ``repeated`` taken
    responses that stood in another pair, and ``taken`` excludes them and the held-out prompts.
    """

    records: Dataset
    counts: dict[str, dict[str, int]]
    fingerprint: str


def load_demos(data: Data) -> DemoMix:
    """The demonstrations of all SFT sources, whichever streams the pairs come from.

    Raises `UserError` for a source that cannot be read or does not have what ``take`` names, or
    if nothing is left.
    """
    counts: dict[str, dict[str, int]] = {}
    parts: list[Dataset] = []
    for name, source in _used(data).items():
        load = _conversations if source.take == "conversation" else _from_pairs
        drawn, counts[name] = load(name, source, data)
        reasons = demo_reasons(drawn)
        counts[name]["repeated"] = int((reasons != KEEP).sum())
        ours = np.array([not is_held_out(prompt, data.heldout) for prompt in drawn["prompt"]], bool)
        parts.append(drawn.select(np.flatnonzero((reasons == KEEP) & ours)))
        counts[name]["taken"] = len(parts[-1])
    if not any(len(part) for part in parts):
        raise UserError(
            "no demonstrations are left for SFT: "
            + (tell(counts, data) or "data.sft names no source with rows")
        )
    return DemoMix(concatenate_datasets(parts), counts, demos_fingerprint(data))


def demos_fingerprint(data: Data) -> str:
    """`DemoMix.fingerprint` without reading the rows."""
    return stable_hash(
        {
            "sources": {name: staged_from(name, source, data) for name, source in _used(data).items()},
            "draw": [data.seed, data.heldout],
            "ranker": ranker_made_of(data.ranker),
            "code": code_version(*RECORD_CODE),
        }
    )


def _used(data: Data) -> dict[str, SftSource]:
    return {name: source for name, source in data.sft.items() if source.size != 0}


def _conversations(name: str, source: SftSource, data: Data) -> tuple[Dataset, dict[str, int]]:
    staged = stage_demos(name, source)
    reasons = demo_reasons(staged)
    usable = np.flatnonzero(reasons == KEEP)
    asked = wanted(source.size, len(usable))
    drawn = np.sort(draw_order(usable, data.seed, name)[:asked])
    missing = asked - len(drawn) if isinstance(source.size, int) else 0
    return staged.select(drawn), {
        **reason_counts(reasons, DEMO_REASONS),
        "drawn": len(drawn),
        "missing": missing,
    }


def _from_pairs(name: str, source: SftSource, data: Data) -> tuple[Dataset, dict[str, int]]:
    if source.reader in DEMO_READERS:
        raise UserError(
            f"source {name!r}: take={source.take} needs pairs, but reader {source.reader!r} reads "
            "conversations; set take=conversation"
        )
    staged = stage_pairs(name, source, data)
    reasons = pair_reasons(staged)
    scorer = make_scorer(data.ranker) if source.take == "more_helpful" else None
    if source.take == "safer":
        chosen = np.array([safer is not None for safer in staged["safer"]], bool)
    else:
        chosen = np.asarray(staged["ordered"], bool) | (scorer is not None)
    usable = np.flatnonzero((reasons == KEEP) & chosen)
    if not len(usable):
        cure = "set data.ranker.kind" if source.take == "more_helpful" else "use a source with safety labels"
        raise UserError(
            f"source {name!r}: take={source.take}, but none of its {len(staged):,} pairs says which response "
            f"that is; {cure}, or take another"
        )
    pairs, counts = draw_pairs(name, source.size, staged, usable, data.seed, scorer)
    no_choice = int(((reasons == KEEP) & ~chosen).sum())
    return _taken(pairs, source.take), {**reason_counts(reasons, REASONS), "no_choice": no_choice, **counts}


def _taken(pairs: Dataset, take: str) -> Dataset:
    """One response of each pair as a demonstration."""

    def pick(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        winners = ["w"] * len(rows) if take == "more_helpful" else batch["safer"]
        return {
            "prompt": batch["prompt"],
            "response": [batch[f"response_{winner}"][i] for i, winner in enumerate(winners)],
            "source": batch["source"],
            "row": batch["row"],
        }

    return derive(pairs, pick, DEMO_FEATURES, ["take", take])
