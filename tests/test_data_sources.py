"""Opening sources: local files of every kind, hub ids, and what goes wrong with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import pytest
from data_support import pair_source, pku_row, runs_root, write_rows  # noqa: F401

from bfpo_exp.data.sources import open_rows, source_fingerprint
from bfpo_exp.errors import UserError

COMMIT = "ff7ba91063016c78a225b0f74e1c0860bb18230f"


def test_every_kind_of_file_reads_alike(tmp_path: Path) -> None:
    rows = [pku_row(prompt=f"p{i}") for i in range(3)]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows))
    parquet = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    lines = [write_rows(tmp_path / name, rows) for name in ("a.jsonl", "a.jsonl.gz")]
    for path in (array, parquet, *lines):
        assert open_rows("s", pair_source("pku_saferlhf", path)).table.to_list() == rows


def test_globs_are_sorted_and_rows_know_their_file(tmp_path: Path) -> None:
    for name, count in (("b.jsonl", 2), ("a.jsonl", 3)):
        write_rows(tmp_path / name, [pku_row(prompt=f"{name}{i}") for i in range(count)])
    rows = open_rows("s", pair_source("pku_saferlhf", tmp_path / "*.jsonl"))
    assert rows.table["prompt"][:] == ["a.jsonl0", "a.jsonl1", "a.jsonl2", "b.jsonl0", "b.jsonl1"]
    assert rows.where(2) == f"source 's', file {tmp_path / 'a.jsonl'}, row 2"
    assert rows.where(4) == f"source 's', file {tmp_path / 'b.jsonl'}, row 1"


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    first, second = (write_rows(tmp_path / name, [pku_row()]) for name in ("a.jsonl", "b.jsonl"))
    content = first.read_bytes()
    expected = hashlib.sha256(len(content).to_bytes(8, "little") + content).hexdigest()
    assert source_fingerprint("s", pair_source("pku_saferlhf", first)) == expected
    assert source_fingerprint("s", pair_source("pku_saferlhf", second)) == expected
    write_rows(second, [pku_row(prompt="q")])
    assert source_fingerprint("s", pair_source("pku_saferlhf", second)) != expected


def test_a_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    source = pair_source("pku_saferlhf", path := tmp_path / "a.jsonl")
    for prompt in ("one", "two"):
        write_rows(path, [pku_row(prompt=prompt)])
        assert open_rows("s", source).table["prompt"][:] == [prompt]


def test_hub_gets_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(hub: str, **arguments: str) -> datasets.Dataset:
        asked.update(arguments, hub=hub)
        return datasets.Dataset.from_list([pku_row()])

    monkeypatch.setattr("bfpo_exp.data.sources.load_dataset", load_dataset)
    source = pair_source("pku_saferlhf", hub="org/name", revision=COMMIT, split="train")
    rows = open_rows("s", source)
    assert asked == {"hub": "org/name", "revision": COMMIT, "split": "train"}
    assert rows.fingerprint == f"org/name@{COMMIT}:train"
    assert rows.where(7) == "source 's', row 7"


def test_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: str, **__: str) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr("bfpo_exp.data.sources.load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"source 's': cannot get org/name@.* \(Couldn't reach the Hub\); .*files="
    ):
        open_rows("s", pair_source("pku_saferlhf", hub="org/name", revision=COMMIT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub": "org/name"}, "source 's': hub=org/name has revision=null.*pin it"),
        ({"hub": "org/name", "revision": "main"}, "revision=main, so its rows may change"),
        ({"hub": "org/name", "revision": COMMIT, "files": ["x.jsonl"]}, "has both hub=org/name and files"),
        ({}, "has neither hub nor files"),
        ({"files": ["/nowhere/x.jsonl"]}, "source 's': no such file: /nowhere/x.jsonl"),
        ({"files": ["/nowhere/*.jsonl"]}, r"no such file: /nowhere/\*.jsonl"),
        ({"files": []}, "files is an empty list"),
    ],
)
def test_sources_that_name_no_rows(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_rows("s", pair_source("pku_saferlhf", **changes))


def test_files_of_unknown_or_mixed_kinds(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("prompt\n")
    with pytest.raises(UserError, match=r"cannot read .*a\.csv; allowed: \.jsonl, .*\.parquet"):
        open_rows("s", pair_source("pku_saferlhf", table))
    lines, parquet = write_rows(tmp_path / "a.jsonl", [pku_row()]), tmp_path / "b.parquet"
    datasets.Dataset.from_list([pku_row()]).to_parquet(parquet)
    with pytest.raises(UserError, match="of one kind in a source"):
        open_rows("s", pair_source("pku_saferlhf", lines, parquet))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "x"}', "", '{"prompt": '], r"a\.jsonl, line 3: not JSON"),
        (["3", "4"], r"a\.jsonl, line 1: expected an object, found int"),
        ([], r"a\.jsonl has no rows"),
    ],
)
def test_files_that_do_not_parse(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        open_rows("s", pair_source("pku_saferlhf", write_rows(tmp_path / "a.jsonl", lines)))
    assert "\n" not in str(error.value)


def test_a_cut_archive(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl.gz", [pku_row(prompt=str(i)) for i in range(100)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
        open_rows("s", pair_source("pku_saferlhf", path))
