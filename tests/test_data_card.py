"""The card tells every count, and its metrics have names that MLflow takes."""

from __future__ import annotations

import re
from pathlib import Path

from data_support import data_of, pair_source, pku_row, runs_root, sft_source, write_rows  # noqa: F401

from bfpo_exp.data.card import card_metrics, dataset_card
from bfpo_exp.data.demos import load_demos
from bfpo_exp.data.mix import load_pairs


def test_card(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [pku_row("p"), pku_row("p"), pku_row("q", second=" ")])
    data = data_of(
        {"pku:small": pair_source("pku_saferlhf", path, assume_safe=True)},
        sft={"demos": sft_source("pku_saferlhf", path, take="safer")},
    )
    pairs, demos = load_pairs(data), load_demos(data)
    tokens = {"pairs": {"pairs": 1, "special_tokens": 0, "tokenised": 1234}}
    card = dataset_card(data, pairs, demos, tokens)
    assert (
        f"`pku:small` (safety, responses without label assumed safe): reader pku_saferlhf, files {path}"
        in card
    )
    assert f"`{pairs.fingerprint}`" in card
    header, _, row = [line for line in card.splitlines() if line.startswith("|")][:3]
    told = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert (told["duplicate"], told["empty_response"], told["kept"]) == ("1", "1", "1")
    assert "| pairs | 1 | 0 | 1,234 |" in card
    assert "`demos` (takes safer)" in card

    metrics = card_metrics(pairs, demos, tokens)
    assert metrics["data/pku_small/duplicate"] == 1.0
    assert metrics["data/cells/safety/safe_unsafe"] == 1.0
    assert metrics["data/sft/demos/taken"] == 1.0
    assert metrics["data/tokens/pairs/tokenised"] == 1234.0
    assert all(re.fullmatch(r"[A-Za-z0-9_\-./ ]+", name) for name in metrics)


def test_card_without_demonstrations_or_tokens(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [pku_row()])
    data = data_of({"s": pair_source("pku_saferlhf", path)})
    card = dataset_card(data, load_pairs(data))
    assert "Demonstrations" not in card
    assert "Tokens" not in card
