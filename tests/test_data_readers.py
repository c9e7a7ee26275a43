"""Each schema: what a row means, and the line that a row which breaks it ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_support import (
    REAL,
    data_of,
    needs_real_data,
    pair_source,
    pku_row,
    runs_root,  # noqa: F401
    sft_source,
    write_rows,
)

from bfpo_exp.config.data import PairSource
from bfpo_exp.data.staged import stage_demos, stage_pairs
from bfpo_exp.errors import UserError


def read(source: PairSource) -> list[dict[str, Any]]:
    return stage_pairs("s", source, data_of({"s": source})).to_list()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def facts(pair: dict[str, Any]) -> tuple[Any, ...]:
    names = ("response_w", "response_l", "ordered", "ranker", "safe_w", "safe_l", "safer", "dirt")
    return tuple(pair[name] for name in names)


def test_pku_puts_the_more_helpful_response_first(tmp_path: Path) -> None:
    rows = [
        pku_row(better_response_id=0, safer_response_id=1, is_response_0_safe=False, is_response_1_safe=True),
        pku_row(better_response_id=1),
        pku_row(),
        pku_row(is_response_0_safe=None, safer_response_id=None),
        pku_row(safer_response_id=None),
    ]
    pairs = read(pair_source("pku_saferlhf", write_rows(tmp_path / "a.jsonl", rows)))
    assert [facts(pair) for pair in pairs] == [
        ("a", "b", True, "data", 0.0, 1.0, "l", ""),
        ("b", "a", True, "data", 0.0, 1.0, "l", ""),
        ("a", "b", False, "none", 1.0, 0.0, "w", ""),  # no order: the source's stays
        ("a", "b", False, "none", None, 0.0, None, ""),  # a missing label stays missing
        ("a", "b", False, "none", 1.0, 0.0, "w", ""),  # the only safe one is the safer one
    ]
    assert [pair["row"] for pair in pairs] == [0, 1, 2, 3, 4]
    assert pairs[0]["prompt"] == [user("p")]
    assert (pairs[0]["stream"], pairs[0]["source"]) == ("safety", "s")


@needs_real_data
def test_pku_full_schema() -> None:
    pairs = read(
        pair_source("pku_saferlhf", REAL / "samples" / "pku_saferlhf_full_schema_5rows_REDACTED.jsonl")
    )
    assert [pair["ordered"] for pair in pairs] == [True] * 5
    # better = safer = 1 in all five rows; the labels of (1, 0):
    assert [(p["safe_w"], p["safe_l"], p["safer"]) for p in pairs] == [
        (0, 0, "w"),
        (1, 1, "w"),
        (1, 1, "w"),
        (1, 0, "w"),
        (0, 0, "w"),
    ]


def test_ultrafeedback_ties_and_prompts(tmp_path: Path) -> None:
    def row(scores: tuple[float, float], rejected_prompt: str = "p") -> dict[str, Any]:
        return {
            "chosen": [user("p"), answer("good")],
            "rejected": [user(rejected_prompt), answer("bad")],
            "score_chosen": scores[0],
            "score_rejected": scores[1],
        }

    rows = [row((8.0, 7.5)), row((7.0, 7.0)), row((8.0, 1.0), "another")]
    source = pair_source("ultrafeedback", write_rows(tmp_path / "a.jsonl", rows), assume_safe=True)
    assert [facts(pair) for pair in read(source)] == [
        ("good", "bad", True, "data", 1.0, 1.0, None, ""),
        ("good", "bad", True, "data", 1.0, 1.0, None, "tie"),
        ("good", "bad", True, "data", 1.0, 1.0, None, "prompt_mismatch"),
    ]


def test_assumed_safety_never_replaces_a_label(tmp_path: Path) -> None:
    rows = [pku_row(is_response_0_safe=None, safer_response_id=None, is_response_1_safe=False)]
    source = pair_source("pku_saferlhf", write_rows(tmp_path / "a.jsonl", rows), assume_safe=True)
    assert facts(read(source)[0])[4:7] == (1.0, 0.0, None)  # nor does it say who is safer


@pytest.mark.parametrize(
    ("preference", "expected"),
    [("safety", (False, "none", None, None, "w")), ("helpfulness", (True, "data", None, None, None))],
)
def test_hh_transcripts(tmp_path: Path, preference: str, expected: tuple[Any, ...]) -> None:
    start = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\nlines Human: quoted"
    rows = [{"chosen": f"{start}\n\nAssistant: good ", "rejected": f"{start}\n\nAssistant: bad"}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    (pair,) = read(pair_source("hh_rlhf", path, options={"preference": preference}))
    assert facts(pair)[:2] == ("good", "bad")
    assert facts(pair)[2:7] == expected
    assert pair["prompt"] == [user("one"), answer("two"), user("three\nlines Human: quoted")]


def test_red_team_numbers_outputs_from_one(tmp_path: Path) -> None:
    row = {
        "prompt": "p",
        "modeloutput1": "a",
        "modeloutput2": "b",
        "is_modelout1_safe": True,
        "is_modelout2_safe": 0,
    }
    rows = [{**row, "better_modelout": 1}, {**row, "better_modelout": 2}]
    pairs = read(pair_source("red_team", write_rows(tmp_path / "a.jsonl", rows)))
    assert [facts(pair) for pair in pairs] == [
        ("a", "b", True, "data", 1.0, 0.0, "w", ""),
        ("b", "a", True, "data", 0.0, 1.0, "l", ""),
    ]


COLUMNS = {"prompt": "q", "response_0": "x", "response_1": "y"}


def test_columns_by_index(tmp_path: Path) -> None:
    rows = [
        {"q": "p", "x": "a", "y": "b", "sx": 0.25, "sy": 1, "more": 1, "safest": 1},
        {
            "q": [user("p"), answer("r"), user("q")],
            "x": "a",
            "y": "b",
            "sx": None,
            "sy": False,
            "more": None,
            "safest": 0,
        },
    ]
    mapped = {**COLUMNS, "safe_0": "sx", "safe_1": "sy", "better": "more", "safer": "safest"}
    pairs = read(pair_source("columns", write_rows(tmp_path / "a.jsonl", rows), columns=mapped))
    assert [facts(pair) for pair in pairs] == [
        ("b", "a", True, "data", 1.0, 0.25, "w", ""),
        ("a", "b", False, "none", None, 0.0, "w", ""),
    ]
    assert pairs[1]["prompt"] == [user("p"), answer("r"), user("q")]


def test_columns_by_preference(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"q": "p", "x": "a", "y": "b"}])
    mapped = {"prompt": "q", "chosen": "x", "rejected": "y"}

    def of(preference: str) -> tuple[Any, ...]:
        return facts(
            read(pair_source("columns", path, columns=mapped, options={"preference": preference}))[0]
        )

    assert of("helpfulness") == ("a", "b", True, "data", None, None, None, "")
    assert of("safety") == ("a", "b", False, "none", None, None, "w", "")
    with pytest.raises(
        UserError, match=r"option 'preference' of reader 'columns' has no value; .*helpfulness or safety"
    ):
        read(pair_source("columns", path, columns=mapped))


def test_ultrachat_takes_the_last_answer(tmp_path: Path) -> None:
    turns = [user("one"), answer("two"), user("three"), answer("four"), user("five")]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": turns}])
    (demo,) = stage_demos("s", sft_source("ultrachat", path)).to_list()
    assert demo == {"prompt": turns[:3], "response": "four", "source": "s", "row": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pku_row(prompt=None), "row 1, column 'prompt': expected a list of messages .*, found null"),
        (pku_row(response_1=None), "row 1, column 'response_1': expected text, found null"),
        (pku_row(response_0=7), "row 1, column 'response_0': expected text, found int 7"),
        (
            pku_row(better_response_id=2),
            "column 'better_response_id': expected one of 0, 1, null, found int 2",
        ),
        (pku_row(is_response_1_safe="no"), "column 'is_response_1_safe': expected true, .* found str"),
        (pku_row(is_response_1_safe=3), "column 'is_response_1_safe': expected true, .* found int 3"),
    ],
)
def test_rows_that_break_the_schema(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [pku_row(), row])
    with pytest.raises(UserError, match=rf"source 's', file {path}, .*{message}"):
        read(pair_source("pku_saferlhf", path))


def test_a_text_that_breaks_the_schema_is_not_shown(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [pku_row(safer_response_id="something harmful")])
    with pytest.raises(UserError, match=r"found str$"):
        read(pair_source("pku_saferlhf", path))


def test_a_missing_column(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": "p", "response_0": "a"}])
    with pytest.raises(UserError, match=r"row 0: column 'prompt' is missing.*found: question, response_0"):
        read(pair_source("pku_saferlhf", path))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([], "found an empty list"),
        ([user("p")], "expected the assistant's as last turn, found a last turn of the user"),
        ([{"role": "human", "content": "p"}], "found role 'human' in message 0"),
        ([{"role": "user", "content": None}], "found content null in message 0"),
    ],
)
def test_messages_that_break_the_schema(tmp_path: Path, chosen: list, message: str) -> None:
    rows = [{"chosen": [user("p"), answer("a")], "rejected": [user("p"), answer("b")]}] * 2
    rows.append({"chosen": chosen, "rejected": [user("p"), answer("b")]})
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=rf"row 2, column 'chosen': .*{message}"):
        read(pair_source("ultrafeedback", path))


@pytest.mark.parametrize("text", ["no turns", "\n\nAssistant: a", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"])
def test_transcripts_that_break_the_schema(tmp_path: Path, text: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"chosen": text, "rejected": text}])
    with pytest.raises(UserError, match=r"row 0, column 'chosen': expected a transcript"):
        read(pair_source("hh_rlhf", path, options={"preference": "safety"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reader": "pku_saferlfh"},
            "unknown reader of pairs in source 's' 'pku_saferlfh'.*nearest: 'pku_saferlhf'",
        ),
        (
            {"reader": "pku_saferlhf", "options": {"x": 1}},
            "unknown option of reader 'pku_saferlhf' in source 's' 'x'",
        ),
        ({"reader": "pku_saferlhf", "columns": {"prompt": "q"}}, "has its own column names"),
        (
            {"reader": "hh_rlhf"},
            "option 'preference' of reader 'hh_rlhf' has no value; it is .*helpfulness or safety",
        ),
        ({"reader": "hh_rlhf", "options": {"preference": "x"}}, "'preference' of reader 'hh_rlhf' is 'x'"),
        ({"reader": "columns"}, "columns maps nothing; reader 'columns' needs prompt"),
        ({"reader": "columns", "columns": {"promt": "q"}}, "unknown field .* nearest: 'prompt'"),
        (
            {
                "reader": "columns",
                "columns": {"prompt": "q", "chosen": "x", "rejected": "y", "better": "z"},
                "options": {"preference": "helpfulness"},
            },
            "columns maps better, but chosen is the better one already",
        ),
    ],
)
def test_readers_that_are_set_up_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [pku_row()])
    with pytest.raises(UserError, match=message):
        read(pair_source(changes.pop("reader"), path, **changes))


def test_a_conversation_reader_reads_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown reader of conversations in source 's' 'ultrafeedback'"):
        stage_demos("s", sft_source("ultrafeedback", write_rows(tmp_path / "a.jsonl", [{}])))


def test_world_generates_its_rows() -> None:
    from bfpo_exp import world

    options = {"unscreened": 0.15, "label_noise": 0.03}
    source = pair_source("world", size=20, options=options)
    expected = world.pairs("safety", 20, seed=0, **options)
    assert [facts(pair)[:7] for pair in read(source)] == [
        tuple(r[k] for k in ("response_w", "response_l", "ordered", "ranker", "safe_w", "safe_l", "safer"))  # type: ignore[literal-required]
        for r in expected
    ]
    assert len(read(source.model_copy(update={"size": 0.5, "options": {"rows": 30}}))) == 30
    with pytest.raises(UserError, match=r"as many rows as options\.rows says"):
        read(source.model_copy(update={"size": None}))
    with pytest.raises(UserError, match=r"options\.stream is for demonstrations"):
        read(source.model_copy(update={"options": {"stream": "safety"}}))
    with pytest.raises(UserError, match="set hub=null and files=null"):
        read(source.model_copy(update={"files": ["x"]}))
    with pytest.raises(UserError, match="option 'unscreened' of reader 'world' is 2; it is the share"):
        read(source.model_copy(update={"options": {"unscreened": 2}}))
