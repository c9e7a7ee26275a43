"""Tokenised data sets: columns, dtypes, counts, and the law of every row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from data_support import (
    ULTRAFEEDBACK,
    bpe_tokenizer,
    chat_format,
    data_of,
    needs_real_data,
    pair_source,
    runs_root,  # noqa: F401
)
from datasets import Dataset

from bfpo_exp.data.arrow import DEMO_FEATURES, PAIR_FEATURES
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.mix import load_pairs
from bfpo_exp.data.tokenise import tokenise_demos, tokenise_pairs
from bfpo_exp.errors import UserError


def pair(
    prompt: str = "open the door",
    w: str = "take the key",
    l: str = "how",  # noqa: E741
    **changes: Any,
) -> dict[str, Any]:
    record = {
        "prompt": [{"role": "user", "content": prompt}],
        "response_w": w,
        "response_l": l,
        "ordered": True,
        "ranker": "data",
        "safe_w": 1.0,
        "safe_l": 0.0,
        "safer": "w",
        "stream": "safety",
        "source": "s",
        "row": 70,
    }
    return {**record, **changes}


def pairs_of(*records: dict[str, Any]) -> Dataset:
    return Dataset.from_list(list(records), features=PAIR_FEATURES)


def chat(**changes: Any) -> ChatFormat:
    return ChatFormat(bpe_tokenizer(), chat_format(**changes))


def test_columns() -> None:
    records = pairs_of(
        pair(),
        pair(w="", safer="l"),  # no token: dropped
        pair(safe_w=0.25, safe_l=None, safer=None, ordered=False, stream="helpfulness"),
        pair(safer="l"),
    )
    tokens, counts = tokenise_pairs(records, form := chat())
    assert counts == {
        "pairs": 4,
        "special_tokens": 0,
        "response_cut_empty": 1,
        "tokenised": 3,
        "truncated_prompts": 0,
        "truncated_responses": 0,
    }
    arrays = tokens.with_format("numpy")[:]
    assert arrays["row"].tolist() == [0, 2, 3]
    assert arrays["safer"].tolist() == [1, 0, -1]
    assert arrays["stream"].tolist() == [1, 0, 1]
    assert arrays["ordered"].tolist() == [True, False, True]
    assert arrays["safe_w"].tolist() == [1.0, 0.25, 1.0]
    assert np.isnan(arrays["safe_l"]).tolist() == [False, True, False]
    dtypes = {
        name: tokens.features[name].dtype
        for name in ("safe_w", "safe_l", "safer", "ordered", "stream", "row")
    }
    assert dtypes == {
        "safe_w": "float32",
        "safe_l": "float32",
        "safer": "int8",
        "ordered": "bool",
        "stream": "int8",
        "row": "int64",
    }
    assert tokens.features["w_ids"].feature.dtype == "int32"
    for name, text in (("w_ids", "take the key"), ("l_ids", "how")):
        assert tokens[0][name] == form.encode(records[0]["prompt"], text).response_ids


def test_a_pair_goes_if_either_response_does() -> None:
    records = pairs_of(pair(), pair(w="a </s> b"), pair(l="a </s> b"), pair(prompt="<s>"))
    tokens, counts = tokenise_pairs(records, chat())
    assert (len(tokens), counts["special_tokens"]) == (1, 3)


def test_truncations_are_counted() -> None:
    long = "open the door " * 20
    records = pairs_of(pair(), pair(prompt=long), pair(w=long), pair(w=long, l=long))
    form = chat(max_length=60, max_prompt_length=48)
    tokens, counts = tokenise_pairs(records, form)
    assert (counts["truncated_prompts"], counts["truncated_responses"]) == (1, 3)
    assert max(len(r["prompt_ids"]) + len(r["w_ids"]) for r in tokens) == 60


def test_demonstrations() -> None:
    demo = {"prompt": [{"role": "user", "content": "open"}], "response": "how", "source": "s", "row": 3}
    records = Dataset.from_list([{**demo, "response": "</s>"}, demo], features=DEMO_FEATURES)
    tokens, counts = tokenise_demos(records, form := chat())
    expected = form.encode(demo["prompt"], "how")  # type: ignore[arg-type]
    assert tokens.to_list() == [
        {
            "prompt_ids": expected.prompt_ids,
            "response_ids": expected.response_ids,
            "trained": [True] * len(expected.response_ids),
            "row": 1,
        }
    ]
    assert counts["demonstrations"] == 2
    assert counts["special_tokens"] == 1


def test_nothing_left() -> None:
    with pytest.raises(
        UserError, match=r"none of 1 pairs is left after tokenisation: special_tokens 1.*max_length=1024"
    ):
        tokenise_pairs(pairs_of(pair(w="</s>")), chat())


@needs_real_data
def test_the_law_on_real_rows() -> None:
    """Every kept row begins with the only BOS and ends with the only end of turn, within the limits."""
    source = pair_source("ultrafeedback", ULTRAFEEDBACK, size=200, stream="helpfulness")
    records = load_pairs(data_of({"uf": source})).records
    form = chat(max_length=600, max_prompt_length=300)
    tokens, counts = tokenise_pairs(records, form)
    assert (
        counts["pairs"]
        == 200
        == counts["tokenised"] + counts["special_tokens"] + counts["response_cut_empty"]
    )
    assert counts["truncated_responses"] > 0
    for row in tokens:
        for name in ("w_ids", "l_ids"):
            ids = row["prompt_ids"] + row[name]
            assert [i for i, t in enumerate(ids) if t == form.bos_id] == [0]
            assert [i for i, t in enumerate(row[name]) if t == form.end_of_turn_id] == [len(row[name]) - 1]
            assert len(ids) <= 600
        assert len(row["prompt_ids"]) <= 300
        assert math.isnan(row["safe_w"])
    untruncated = chat(max_length=10**6, max_prompt_length=10**5)
    row = tokenise_pairs(records, untruncated)[0][0]
    assert form.tokenizer.decode(row["w_ids"][:-1]) == records[row["row"]]["response_w"]
