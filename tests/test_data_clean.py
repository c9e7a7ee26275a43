"""The rules of cleaning on made rows, and their counts on real rows by a second way."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from data_support import (
    HH,
    PKU,
    ULTRAFEEDBACK,
    data_of,
    needs_real_data,
    pair_source,
    pku_row,
    read_real,
    runs_root,  # noqa: F401
    write_rows,
)

from bfpo_exp.data.clean import pair_reasons
from bfpo_exp.data.mix import load_pairs
from bfpo_exp.data.staged import stage_pairs


def reasons(tmp_path: Path, rows: list[dict[str, Any]]) -> list[str]:
    source = pair_source("pku_saferlhf", write_rows(tmp_path / "a.jsonl", rows))
    return list(pair_reasons(stage_pairs("s", source, data_of({"s": source}))))


SAFE = {"is_response_0_safe": True, "is_response_1_safe": True, "safer_response_id": None}
NO_LABELS = {"is_response_0_safe": None, "is_response_1_safe": None, "safer_response_id": None}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([pku_row(first=" \n"), pku_row(second="")], ["empty_response"] * 2),
        ([pku_row(first="", second="")], ["empty_response"]),  # and not identical as well
        ([pku_row(first="a ", second="a", **SAFE)], ["identical_responses"]),
        ([pku_row(), pku_row(), pku_row()], ["", "duplicate", "duplicate"]),
        ([pku_row(), pku_row(prompt="q"), pku_row(second="c")], ["", "", ""]),
        # the same pair written the other way round says the same
        (
            [
                pku_row(better_response_id=1),
                pku_row(
                    first="b",
                    second="a",
                    better_response_id=0,
                    safer_response_id=1,
                    is_response_0_safe=False,
                    is_response_1_safe=True,
                ),
            ],
            ["", "duplicate"],
        ),
        # ... or the opposite
        ([pku_row(better_response_id=0), pku_row(better_response_id=1)], ["contradiction"] * 2),
        ([pku_row(**SAFE, better_response_id=b) for b in (0, 0, 1)], ["contradiction"] * 3),
        (
            [pku_row(**{**SAFE, "safer_response_id": 0}), pku_row(**{**SAFE, "safer_response_id": 1})],
            ["contradiction"] * 2,
        ),
        # one text, two labels: every pair with it, whatever stands beside it
        (
            [
                pku_row(),
                pku_row(second="c", first="a", is_response_0_safe=False),
                pku_row(first="d", second="e"),
            ],
            ["contradiction", "contradiction", ""],
        ),
        ([pku_row(), pku_row(prompt="q", is_response_0_safe=False)], ["", ""]),  # of another prompt
        # what is missing contradicts nothing and is not the same
        ([pku_row(better_response_id=0), pku_row()], ["", ""]),
        ([pku_row(), pku_row(**NO_LABELS)], ["", ""]),
        # labels of dropped rows are evidence, orders are not
        (
            [pku_row(), pku_row(second="", is_response_0_safe=False)],
            ["contradiction", "empty_response"],
        ),
    ],
)
def test_rules(tmp_path: Path, rows: list[dict[str, Any]], expected: list[str]) -> None:
    assert reasons(tmp_path, rows) == expected


def counts_of(source: Any) -> dict[str, int]:
    return load_pairs(data_of({"s": source})).counts["s"]


@needs_real_data
def test_pku_counts() -> None:
    """3,272 real pairs, labels both ways and duplicates, counted by plain Python."""
    rows = read_real(PKU)
    labels: dict[tuple[str, str], set[bool]] = defaultdict(set)
    for row in rows:
        for i in (0, 1):
            labels[row["prompt"], row[f"response_{i}"]].add(row[f"is_response_{i}_safe"])
    both = {text for text, seen in labels.items() if len(seen) == 2}
    contradictory = [
        r for r in rows if {(r["prompt"], r["response_0"]), (r["prompt"], r["response_1"])} & both
    ]
    rest = [r for r in rows if r not in contradictory]
    distinct = {
        (
            r["prompt"],
            frozenset(
                (r[f"response_{i}"], r[f"is_response_{i}_safe"], r["safer_response_id"] == i) for i in (0, 1)
            ),
        )
        for r in rest
    }
    assert both  # the rule is not idle
    assert len(distinct) < len(rest)
    counts = counts_of(pair_source("pku_saferlhf", PKU))
    assert counts["rows"] == len(rows) == 3272
    assert counts["contradiction"] == len(contradictory)
    assert counts["duplicate"] == len(rest) - len(distinct)
    assert counts["kept"] == counts["taken"] == len(distinct)
    assert (counts["ordered"], counts["safer"], counts["labelled"]) == (0, len(distinct), len(distinct))


@needs_real_data
def test_ultrafeedback_counts() -> None:
    rows = read_real(ULTRAFEEDBACK)
    ties = [r["score_chosen"] == r["score_rejected"] for r in rows]
    texts = [(r["chosen"][-1]["content"].strip(), r["rejected"][-1]["content"].strip()) for r in rows]
    empty = [not tie and "" in pair for tie, pair in zip(ties, texts, strict=True)]
    same = [not tie and not e and a == b for tie, e, (a, b) in zip(ties, empty, texts, strict=True)]
    counts = counts_of(pair_source("ultrafeedback", ULTRAFEEDBACK, stream="helpfulness"))
    assert counts["tie"] == sum(ties) == 111
    assert counts["empty_response"] == sum(empty) > 0
    assert counts["identical_responses"] == sum(same) > 0
    assert counts["kept"] == 1000 - sum(ties) - sum(empty) - sum(same) == counts["ordered"]


@needs_real_data
def test_hh_counts() -> None:
    """Transcripts whose text before the last answer differs do not share their conversation."""
    rows = read_real(HH)
    cut = [tuple(r[k].rpartition("\n\nAssistant:") for k in ("chosen", "rejected")) for r in rows]
    mismatched = [a[0] != b[0] for a, b in cut]
    empty = [not m and not (a[2].strip() and b[2].strip()) for m, (a, b) in zip(mismatched, cut, strict=True)]
    counts = counts_of(pair_source("hh_rlhf", HH, options={"preference": "safety"}))
    assert counts["prompt_mismatch"] == sum(mismatched) == 4
    assert counts["empty_response"] == sum(empty)
    assert counts["kept"] == 1369 - sum(mismatched) - sum(empty) == counts["safer"]
