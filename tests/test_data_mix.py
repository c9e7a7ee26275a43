"""The mix: streams, subsets, the held-out side, label cells, fingerprints, demonstrations."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from data_support import (
    PKU,
    ULTRAFEEDBACK,
    data_of,
    needs_real_data,
    pair_source,
    pku_row,
    runs_root,  # noqa: F401
    sft_source,
    write_rows,
)
from datasets import load_from_disk

from bfpo_exp.config.data import PairSource
from bfpo_exp.data.arrow import PAIR_FEATURES
from bfpo_exp.data.clean import REASONS
from bfpo_exp.data.demos import demos_fingerprint, load_demos
from bfpo_exp.data.draw import is_held_out
from bfpo_exp.data.mix import PairMix, load_pairs, pairs_fingerprint
from bfpo_exp.data.requirements import missing_labels
from bfpo_exp.errors import UserError


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [pku_row(f"prompt {i}", f"a{i}", f"b{i}") for i in range(200)])


def drawn(mix: PairMix, source: str = "s") -> list[int]:
    return [r["row"] for r in mix.records if r["source"] == source]


def test_a_subset_is_random_seeded_and_the_sources_own(rows_file: Path) -> None:
    def rows(size: int | float | None, seed: int = 0, **others: PairSource) -> list[int]:
        sources = {"s": pair_source("pku_saferlhf", rows_file, size=size), **others}
        return drawn(load_pairs(data_of(sources, seed=seed)))

    some = rows(50)
    assert len(set(some)) == 50
    assert some == sorted(some) != list(range(50))
    assert rows(50) == some
    assert rows(50, seed=1) != some
    assert rows(50, t=pair_source("pku_saferlhf", rows_file)) == some
    assert rows(0.25) == some
    assert rows(1.0) == rows(None) == list(range(200))
    same_file = load_pairs(data_of({n: pair_source("pku_saferlhf", rows_file, size=50) for n in ("s", "t")}))
    assert drawn(same_file, "s") != drawn(same_file, "t")


def test_asking_for_more_than_there_is(rows_file: Path) -> None:
    mix = load_pairs(data_of({"s": pair_source("pku_saferlhf", rows_file, size=500)}))
    assert len(mix.records) == 200
    assert mix.counts["s"]["missing"] == 300


def test_held_out_prompts_are_never_trained_on(rows_file: Path) -> None:
    data = data_of({"s": pair_source("pku_saferlhf", rows_file)}, heldout=0.2)
    train, held_out = load_pairs(data), load_pairs(data, heldout=True)
    sides = [{r["prompt"][-1]["content"] for r in mix.records} for mix in (train, held_out)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"prompt {i}" for i in range(200)}
    assert 20 < len(sides[1]) < 65
    assert train.counts["s"]["taken"] + held_out.counts["s"]["taken"] == train.counts["s"]["drawn"]
    other_seed = load_pairs(data.model_copy(update={"seed": 1}), heldout=True)
    assert drawn(other_seed) == drawn(held_out)
    assert train.fingerprint != held_out.fingerprint


def test_a_conversation_is_on_the_side_of_its_first_turn() -> None:
    opening = {"role": "user", "content": "How do I  open it?"}
    longer = [
        {"role": "system", "content": "be kind"},
        {**opening, "content": " how do i open it? "},
        opening,
    ]
    for share in (0.1, 0.5, 0.9):
        assert is_held_out([opening], share) == is_held_out(longer, share)  # type: ignore[list-item, arg-type]
    assert not is_held_out([opening], 0.0)  # type: ignore[list-item]


def test_only_streams_in_use_are_read(rows_file: Path) -> None:
    sources = {
        "s": pair_source("pku_saferlhf", rows_file),
        "h": pair_source("pku_saferlhf", "/nowhere.jsonl", stream="helpfulness"),
        "empty": pair_source("pku_saferlhf", "/nowhere.jsonl", size=0),
    }
    mix = load_pairs(data_of(sources, streams=["safety"]))
    assert list(mix.counts) == ["s"]
    assert mix.streams == {"s": "safety"}
    with pytest.raises(UserError, match="no such file"):
        load_pairs(data_of(sources))


def test_records_keep_missing_labels_through_the_disk(tmp_path: Path) -> None:
    rows = [
        pku_row("p", is_response_0_safe=None, safer_response_id=None, is_response_1_safe=None),
        pku_row("q"),
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    records = load_pairs(data_of({"s": pair_source("pku_saferlhf", path)})).records
    assert records.features == PAIR_FEATURES
    records.save_to_disk(tmp_path / "saved")
    first, second = load_from_disk(tmp_path / "saved").to_list()
    assert (first["safe_w"], first["safe_l"], first["safer"]) == (None, None, None)
    assert (second["safe_w"], second["safe_l"], second["safer"]) == (1.0, 0.0, "w")


def test_cells(tmp_path: Path) -> None:
    def row(i: int, first: bool | None, second: bool | None, better: int | None = 0) -> dict[str, Any]:
        labels = {"is_response_0_safe": first, "is_response_1_safe": second, "safer_response_id": None}
        return pku_row(f"p{i}", better_response_id=better, **labels)

    labels = [(True, True), (True, False), (True, False), (False, True), (False, False), (None, True)]
    path = write_rows(tmp_path / "a.jsonl", [row(i, *pair) for i, pair in enumerate(labels)])
    turned = write_rows(
        tmp_path / "b.jsonl", [row(9, True, False, better=1), row(8, True, True, better=None)]
    )
    sources = {
        "s": pair_source("pku_saferlhf", path),
        "h": pair_source("pku_saferlhf", turned, stream="helpfulness"),
    }
    cells = load_pairs(data_of(sources)).cells
    names = ("safe_safe", "safe_unsafe", "unsafe_safe", "unsafe_unsafe", "unlabelled", "ordered", "pairs")
    assert {stream: [counts[name] for name in names] for stream, counts in cells.items()} == {
        "safety": [1, 2, 1, 1, 1, 6, 6],
        "helpfulness": [1, 0, 1, 0, 0, 1, 2],
        "total": [2, 2, 2, 1, 1, 7, 8],
    }


def test_fingerprint_is_of_what_determines_the_records(tmp_path: Path, rows_file: Path) -> None:
    source = pair_source("pku_saferlhf", rows_file)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(rows_file.read_bytes())
    other = write_rows(tmp_path / "other.jsonl", [pku_row()])

    def of(changed: PairSource = source, name: str = "s", **changes: Any) -> str:
        return pairs_fingerprint(data_of({name: changed}, **changes))

    same = [
        of(),
        of(pair_source("pku_saferlhf", copy)),
        of(name="s", batches="shuffle"),
        of(sft={"x": sft_source("ultrachat")}),
    ]
    assert len(set(same)) == 1
    different = [
        of(pair_source("pku_saferlhf", other)),
        of(pair_source("pku_saferlhf", rows_file, size=10)),
        of(pair_source("pku_saferlhf", rows_file, assume_safe=True)),
        of(name="t"),
        of(seed=1),
        of(heldout=0.1),
        of(ranker={"kind": "longer", "columns": None, "model": None, "output": 0}),
    ]
    assert len({*different, same[0]}) == len(different) + 1
    assert load_pairs(data_of({"s": source})).fingerprint == same[0]


def test_an_empty_stream(tmp_path: Path, rows_file: Path) -> None:
    same = write_rows(tmp_path / "a.jsonl", [pku_row(second="a")] * 3)
    sources = {
        "s": pair_source("pku_saferlhf", same),
        "h": pair_source("pku_saferlhf", rows_file, stream="helpfulness"),
    }
    with pytest.raises(
        UserError,
        match=r"no pairs are left for the stream 'safety': source 's': rows 3, identical_responses 3$",
    ):
        load_pairs(data_of(sources))
    with pytest.raises(UserError, match=r"no pairs are left .*data\.heldout=0\.0 is the share"):
        load_pairs(data_of({"s": pair_source("pku_saferlhf", rows_file)}), heldout=True)


@needs_real_data
def test_real_mix_in_time() -> None:
    data = data_of(
        {
            "pku": pair_source("pku_saferlhf", PKU),
            "ultrafeedback": pair_source(
                "ultrafeedback", ULTRAFEEDBACK, stream="helpfulness", assume_safe=True
            ),
        }
    )
    start = time.perf_counter()
    mix = load_pairs(data)
    assert time.perf_counter() - start < 10  # about 1 s on two idle cores
    for counts in mix.counts.values():
        assert counts["rows"] == counts["kept"] + sum(counts[reason] for reason in REASONS)
    assert mix.cells["helpfulness"]["safe_safe"] == mix.counts["ultrafeedback"]["taken"]
    assert (
        mix.cells["safety"]["safe_unsafe"] + mix.cells["safety"]["unsafe_safe"] == mix.counts["pku"]["taken"]
    )


# ------------------------------------------------------------ demonstrations


def test_demonstrations_of_pairs(tmp_path: Path) -> None:
    rows = [
        pku_row("p", better_response_id=1),
        pku_row(
            "q", better_response_id=1, is_response_0_safe=False, is_response_1_safe=True, safer_response_id=1
        ),
        pku_row("r"),
        pku_row("t", better_response_id=0, is_response_1_safe=True, safer_response_id=None),
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)

    def taken(take: str, **changes: Any) -> list[tuple[str, str]]:
        mix = load_demos(data_of(sft={"d": sft_source("pku_saferlhf", path, take=take)}, **changes))
        assert mix.counts["d"]["no_choice"] == len(rows) - len(mix.records)
        return [(d["prompt"][0]["content"], d["response"]) for d in mix.records]

    assert taken("more_helpful") == [("p", "b"), ("q", "b"), ("t", "a")]
    assert taken("safer") == [("p", "a"), ("q", "b"), ("r", "a")]


def test_demonstrations_of_conversations(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": turns}, {"messages": [turns[0], {**turns[1], "content": " "}]}]
    data = data_of(sft={"d": sft_source("ultrachat", write_rows(tmp_path / "a.jsonl", rows))})
    mix = load_demos(data)
    assert mix.records.to_list() == [{"prompt": turns[:1], "response": "a", "source": "d", "row": 0}]
    counts = {"rows": 3, "empty_response": 1, "duplicate": 1, "kept": 1, "drawn": 1, "missing": 0}
    assert mix.counts["d"] == {**counts, "repeated": 0, "taken": 1}
    assert mix.fingerprint == demos_fingerprint(data)


def test_demonstrations_leave_out_held_out_prompts(rows_file: Path) -> None:
    pairs = {"s": pair_source("pku_saferlhf", rows_file)}
    sft = {"d": sft_source("pku_saferlhf", rows_file, take="safer")}
    data = data_of(pairs, sft=sft, heldout=0.2)
    held_out = {r["prompt"][0]["content"] for r in load_pairs(data, heldout=True).records}
    mix = load_demos(data)
    assert held_out.isdisjoint(d["prompt"][0]["content"] for d in mix.records)
    assert len(mix.records) == 200 - len(held_out)


def test_a_response_taken_from_two_pairs_is_demonstrated_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [pku_row(second=text) for text in "bcd"])
    mix = load_demos(data_of(sft={"d": sft_source("pku_saferlhf", path, take="safer")}))
    assert len(mix.records) == 1
    assert mix.counts["d"]["repeated"] == 2


def test_demonstrations_that_cannot_be_taken(tmp_path: Path, rows_file: Path) -> None:
    with pytest.raises(
        UserError, match=r"take=more_helpful, but none of its 200 pairs says .* set data\.ranker"
    ):
        load_demos(data_of(sft={"d": sft_source("pku_saferlhf", rows_file, take="more_helpful")}))
    with pytest.raises(UserError, match="reader 'ultrachat' reads conversations; set take=conversation"):
        load_demos(data_of(sft={"d": sft_source("ultrachat", rows_file, take="safer")}))
    with pytest.raises(UserError, match="unknown reader of conversations in source 'd' 'pku_saferlhf'"):
        load_demos(data_of(sft={"d": sft_source("pku_saferlhf", rows_file)}))
    with pytest.raises(
        UserError, match=r"no demonstrations are left for SFT: data\.sft names no source with rows"
    ):
        load_demos(data_of())


# ------------------------------------------------------------ what a loss needs


def test_missing_labels(tmp_path: Path) -> None:
    safety = write_rows(tmp_path / "s.jsonl", [pku_row(f"p{i}") for i in range(4)])
    unlabelled = {"is_response_0_safe": None, "is_response_1_safe": None, "safer_response_id": None}
    helpful = write_rows(tmp_path / "h.jsonl", [pku_row(better_response_id=0, **unlabelled)])

    def mix(assume_safe: bool = True, **changes: Any) -> PairMix:
        helpfulness = pair_source("pku_saferlhf", helpful, stream="helpfulness", assume_safe=assume_safe)
        return load_pairs(data_of({"pku": pair_source("pku_saferlhf", safety), "uf": helpfulness}, **changes))

    missing_labels({"safety"}, "stream", mix())
    missing_labels(set(), "stream", mix(assume_safe=False))
    missing_labels(set(), "safety", mix(streams=["safety"]))
    missing_labels({"safety"}, "helpfulness", mix(streams=["helpfulness"]))
    with pytest.raises(
        UserError,
        match="loss bfpo trains on helpfulness order, but 4 of 4 pairs of source 'pku' have none; "
        r"supply it with data\.ranker\.kind=column\|model\|longer, or choose a loss with loss\.order=stream",
    ):
        missing_labels({"safety"}, "helpfulness", mix(), "bfpo")
    with pytest.raises(UserError, match="trains on safety order, but 1 of 1 pairs of source 'uf' have none"):
        missing_labels(set(), "safety", mix())
    with pytest.raises(
        UserError,
        match=r"needs the safety labels .* 1 of 1 pairs .*set data\.pairs\.uf\.assume_safe=true",
    ):
        missing_labels({"safety"}, "stream", mix(assume_safe=False))
