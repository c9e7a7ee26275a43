"""Rankers: who orders what, and that labels follow their responses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import (
    NO_RANKER,
    PKU,
    bpe_tokenizer,
    data_of,
    needs_real_data,
    pair_source,
    pku_row,
    read_real,
    runs_root,  # noqa: F401
    write_rows,
)
from reward_support import write_classifier

from bfpo_exp.config.data import Ranker
from bfpo_exp.data.mix import load_pairs, pairs_fingerprint
from bfpo_exp.data.rank import make_scorer, rank
from bfpo_exp.data.staged import stage_pairs
from bfpo_exp.errors import UserError


def ranked(
    path: Path, size: int | float | None = None, **ranker: Any
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    mix = load_pairs(
        data_of({"s": pair_source("pku_saferlhf", path, size=size)}, ranker={**NO_RANKER, **ranker})
    )
    return mix.records.to_list(), mix.counts["s"]


def facts(pair: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        pair[k] for k in ("response_w", "response_l", "ordered", "ranker", "safe_w", "safe_l", "safer")
    )


def test_longer(tmp_path: Path) -> None:
    rows = [
        pku_row("p", "short", "the longer one"),
        pku_row("q", "the longer one", "short"),
        pku_row("r", "equal", "level"),
        pku_row("t", "short", "the longer one", better_response_id=0),  # the data's order stays
    ]
    pairs, counts = ranked(write_rows(tmp_path / "a.jsonl", rows), kind="longer")
    assert [facts(pair) for pair in pairs] == [
        ("the longer one", "short", True, "longer", 0.0, 1.0, "l"),
        ("the longer one", "short", True, "longer", 1.0, 0.0, "w"),
        ("short", "the longer one", True, "data", 1.0, 0.0, "w"),
    ]
    assert [pair["row"] for pair in pairs] == [0, 1, 3]
    assert (counts["kept"], counts["rank_tie"], counts["drawn"], counts["ordered"]) == (4, 1, 3, 3)


def test_none_leaves_pairs_unordered(tmp_path: Path) -> None:
    pairs, counts = ranked(write_rows(tmp_path / "a.jsonl", [pku_row("p", "short", "the longer one")]))
    assert facts(pairs[0]) == ("short", "the longer one", False, "none", 1.0, 0.0, "w")
    assert counts["ordered"] == 0


def test_column(tmp_path: Path) -> None:
    columns = ["score_0", "score_1"]
    rows = [
        pku_row("p", score_0=0.5, score_1=2),
        pku_row("q", score_0=2.0, score_1=0.5),
        pku_row("r", score_0=1.0, score_1=1.0),
        pku_row("t", better_response_id=1, score_0=None, score_1=None),  # needs no score
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    pairs, counts = ranked(path, kind="column", columns=columns)
    name = "column:score_0,score_1"
    assert [facts(pair) for pair in pairs] == [
        ("b", "a", True, name, 0.0, 1.0, "l"),
        ("a", "b", True, name, 1.0, 0.0, "w"),
        ("b", "a", True, "data", 0.0, 1.0, "l"),
    ]
    assert counts["rank_tie"] == 1
    with pytest.raises(
        UserError, match=r"source 's', row 0, column 'score_x': expected a number for .*found null"
    ):
        ranked(path, kind="column", columns=["score_0", "score_x"])
    texts = write_rows(tmp_path / "b.jsonl", [pku_row(score_0="much", score_1=1)])
    with pytest.raises(UserError, match="row 0, column 'score_0': expected a number or null, found str"):
        ranked(texts, kind="column", columns=columns)


def test_a_size_is_reached_in_spite_of_ties(tmp_path: Path) -> None:
    rows = [pku_row(f"p{i}", "a" * (1 + i % 2), "bb") for i in range(40)]  # half of them as long
    path = write_rows(tmp_path / "a.jsonl", rows)
    pairs, counts = ranked(path, size=15, kind="longer")
    assert (len(pairs), counts["drawn"], counts["missing"]) == (15, 15, 0)
    pairs, counts = ranked(path, size=30, kind="longer")
    assert (len(pairs), counts["rank_tie"], counts["missing"]) == (20, 20, 10)


def test_only_rows_that_are_needed_are_scored(tmp_path: Path) -> None:
    rows = [pku_row(f"p{i}", "a", "bb") for i in range(40)]
    source = pair_source("pku_saferlhf", write_rows(tmp_path / "a.jsonl", rows))
    staged = stage_pairs("s", source, data_of({"s": source}))
    scorer = make_scorer(Ranker(**{**NO_RANKER, "kind": "longer"}))
    assert scorer is not None
    scored: list[int] = []

    def counting(pairs: Any) -> np.ndarray:
        scored.append(len(pairs))
        return scorer.scores(pairs)

    rank(staged, np.arange(40), 10, type(scorer)("longer", counting))
    assert scored == [10]


@needs_real_data
def test_longer_on_real_pairs() -> None:
    pairs, _ = ranked(PKU, kind="longer")
    source = read_real(PKU)
    for pair in pairs:
        row = source[pair["row"]]
        texts = {row[f"response_{i}"]: row[f"is_response_{i}_safe"] for i in (0, 1)}
        assert len(pair["response_w"]) > len(pair["response_l"])
        assert (texts[pair["response_w"]], texts[pair["response_l"]]) == (pair["safe_w"], pair["safe_l"])
        assert row[f"response_{row['safer_response_id']}"] == pair[f"response_{pair['safer']}"]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier with the outputs a and b."""
    return write_classifier(tmp_path_factory.mktemp("reward_model"), bpe_tokenizer())


@pytest.mark.parametrize("output", [0, 1, "b"])
def test_model(tmp_path: Path, reward_model: Path, output: int | str) -> None:
    """Batched and padded scores order pairs as scores of one text at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)

    def score(prompt: str, response: str) -> float:
        text = f"<s><|user|>\n{prompt}</s>\n<|assistant|>\n{response}</s>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            number = {"b": 1}.get(output, output)
            return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, number].item()

    rows = [pku_row(f"door {i}", "key " * (i % 5 + 1), "the open door" + "!" * i) for i in range(20)]
    pairs, _ = ranked(
        write_rows(tmp_path / "a.jsonl", rows), kind="model", model=str(reward_model), output=output
    )
    expected = [score(r["prompt"], r["response_0"]) > score(r["prompt"], r["response_1"]) for r in rows]
    assert 0 < sum(expected) < 20  # both orders occur
    assert [p["response_w"] == r["response_0"] for p, r in zip(pairs, rows, strict=True)] == expected
    assert {pair["ranker"] for pair in pairs} == {f"model:{reward_model.name}"}


def test_models_that_cannot_rank(tmp_path: Path, reward_model: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [pku_row()])
    with pytest.raises(UserError, match=r"data\.ranker\.output=2 is not allowed: .* has 2 outputs"):
        ranked(path, kind="model", model=str(reward_model), output=2)
    with pytest.raises(UserError, match=r"unknown data\.ranker\.output 'c'; allowed: a, b"):
        ranked(path, kind="model", model=str(reward_model), output="c")
    with pytest.raises(
        UserError, match="is no folder, and as a hub id it is not pinned; write org/name@<commit>"
    ):
        ranked(path, kind="model", model="org/name")
    with pytest.raises(UserError, match="cannot be loaded"):
        ranked(path, kind="model", model=str(tmp_path))


def test_a_model_without_a_trained_output_layer_cannot_rank(tmp_path: Path) -> None:
    """transformers would load it, and give it an output layer of random weights."""
    from model_support import made_model

    made_model().save_pretrained(tmp_path / "policy")
    bpe_tokenizer().save_pretrained(tmp_path / "policy")
    path = write_rows(tmp_path / "a.jsonl", [pku_row()])
    with pytest.raises(UserError, match=r"data\.ranker\.model=.*policy is a LlamaForCausalLM"):
        ranked(path, kind="model", model=str(tmp_path / "policy"))


def test_fingerprint_follows_the_models_weights(tmp_path: Path, reward_model: Path) -> None:
    import shutil

    copy = shutil.copytree(reward_model, tmp_path / "copy")
    source = pair_source("pku_saferlhf", write_rows(tmp_path / "a.jsonl", [pku_row()]))

    def fingerprint() -> str:
        return pairs_fingerprint(
            data_of({"s": source}, ranker={**NO_RANKER, "kind": "model", "model": str(copy)})
        )

    before = fingerprint()
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert fingerprint() != before
