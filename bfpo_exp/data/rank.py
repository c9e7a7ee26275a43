"""Supplying a helpfulness order to pairs that have none; an order of the data is never touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from bfpo_exp.config.data import Ranker
from bfpo_exp.data.arrow import PAIR_FEATURES, derive
from bfpo_exp.errors import UserError
from bfpo_exp.rewards.classifier import classifier_fingerprint, load_classifier, output_number

Scores = Callable[[Dataset], np.ndarray]


@dataclass(frozen=True)
class Scorer:
    """A ranker at work: its name in the records, and scores (pairs, 2), higher = more helpful."""

    name: str
    scores: Scores


def make_scorer(ranker: Ranker) -> Scorer | None:
    """The scorer of the config; None for kind ``none``, which leaves unordered pairs unordered."""
    if ranker.kind == "none":
        return None
    if ranker.kind == "longer":
        return Scorer("longer", _lengths)
    if ranker.kind == "column":
        assert ranker.columns is not None  # by the schema
        return Scorer("column:" + ",".join(ranker.columns), lambda pairs: _columns(pairs, ranker))
    assert ranker.model is not None  # by the schema
    return Scorer(f"model:{Path(ranker.model).name}", _logits(ranker.model, ranker.output))


def ranker_made_of(ranker: Ranker) -> dict[str, Any]:
    """What determines the ranker's order, as plain values; of a local model its files' content."""
    values = ranker.model_dump(mode="json")
    if ranker.kind == "model" and ranker.model:
        values["model"] = classifier_fingerprint(ranker.model)
    return values


def rank(staged: Dataset, order: np.ndarray, size: int, scorer: Scorer | None) -> tuple[Dataset, int]:
    """The first ``size`` pairs in the given order that the scorer does not call equal.

    ``order`` holds row numbers of ``staged`` (`arrow.STAGED_FEATURES`); only as many rows as are
    needed are scored.  Returns the pairs (`arrow.PAIR_FEATURES`) in the order of their rows, and
    how many were dropped as ties of the ranker.
    """
    taken: list[np.ndarray] = []
    turned: list[np.ndarray] = []
    ties = position = count = 0
    while count < size and position < len(order):
        rows = order[position : position + size - count]
        position += len(rows)
        preference = _preference(staged.select(rows), scorer)
        taken.append(rows[preference != 0])
        turned.append(preference[preference != 0] < 0)
        ties += int((preference == 0).sum())
        count += len(taken[-1])
    rows = np.concatenate(taken) if taken else np.array([], np.int64)
    swap = np.concatenate(turned) if turned else np.array([], bool)
    ascending = np.argsort(rows, kind="stable")
    return _reordered(staged.select(rows[ascending]), swap[ascending], scorer), ties


def _preference(pairs: Dataset, scorer: Scorer | None) -> np.ndarray:
    """+1 to keep the order of a pair, -1 to swap it, 0 for a tie; ordered pairs keep theirs."""
    preference = np.ones(len(pairs), np.int8)
    unordered = np.flatnonzero(~np.asarray(pairs["ordered"], bool))
    if scorer is not None and len(unordered):
        scores = scorer.scores(pairs.select(unordered))
        preference[unordered] = np.sign(scores[:, 0] - scores[:, 1]).astype(np.int8)
    return preference


def _reordered(staged: Dataset, swap: np.ndarray, scorer: Scorer | None) -> Dataset:
    """The pairs in canonical order: everything that names a response follows its swap."""
    opposite = {"w": "l", "l": "w", None: None}

    def canonical(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        pairs = {column: list(batch[column]) for column in PAIR_FEATURES}
        for i, row in enumerate(rows):
            if swap[row]:
                for w, l in (("response_w", "response_l"), ("safe_w", "safe_l")):  # noqa: E741
                    pairs[w][i], pairs[l][i] = pairs[l][i], pairs[w][i]
                pairs["safer"][i] = opposite[pairs["safer"][i]]
            if scorer is not None and not pairs["ordered"][i]:
                pairs["ordered"][i], pairs["ranker"][i] = True, scorer.name
        return pairs

    return derive(
        staged,
        canonical,
        PAIR_FEATURES,
        ["canonical", scorer and scorer.name, np.packbits(swap).tobytes().hex()],
    )


def _logits(model: str, output: int | str) -> Scores:
    """One output of a sequence classifier."""
    classifier = load_classifier(model, "data.ranker.model")
    number = output_number(classifier.model.config, output, "data.ranker.output")

    def scores(pairs: Dataset) -> np.ndarray:
        prompts, responses_w, responses_l = (
            pairs[name][:] for name in ("prompt", "response_w", "response_l")
        )
        logits = classifier.logits(prompts + prompts, responses_w + responses_l)
        return logits[:, number].reshape(2, -1).T

    return scores


def _lengths(pairs: Dataset) -> np.ndarray:
    return np.array([[len(text) for text in pairs[column]] for column in ("response_w", "response_l")]).T


def _columns(pairs: Dataset, ranker: Ranker) -> np.ndarray:
    scores = np.array([pairs["score_w"], pairs["score_l"]], float).T
    missing = np.isnan(scores)
    if missing.any():
        index, column = np.argwhere(missing)[0]
        pair = pairs[int(index)]
        assert ranker.columns is not None
        raise UserError(
            f"source {pair['source']!r}, row {pair['row']}, column {ranker.columns[column]!r}: expected a "
            "number for data.ranker.kind=column, found null"
        )
    return scores
