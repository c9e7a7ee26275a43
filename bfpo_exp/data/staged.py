"""All rows of one source as records, before cleaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features

from bfpo_exp.config.data import Data, PairSource, Ranker, Source
from bfpo_exp.data.arrow import DEMO_FEATURES, STAGED_FEATURES, derive
from bfpo_exp.data.readers import WORLD, demo_reader, pair_reader
from bfpo_exp.data.readers.base import RowReader, demo_record, pair_record, staged_pair
from bfpo_exp.data.readers.rows import Row, SchemaError
from bfpo_exp.data.readers.world import world_options, world_pairs
from bfpo_exp.data.sources import Rows, open_rows, source_fingerprint
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version

# What of this folder determines records; a hash of it is part of their fingerprints.
RECORD_CODE = (
    *(
        f"data/{part}"
        for part in ("arrow", "clean", "demos", "draw", "mix", "rank", "readers", "sources", "staged")
    ),
    "rewards/classifier",
)


def stage_pairs(name: str, source: Source, data: Data) -> Dataset:
    """Every row of a source of pairs, in `arrow.STAGED_FEATURES`."""
    if source.reader == WORLD:
        records = world_pairs(name, source, data.seed)
        return Dataset.from_list([staged_pair(record) for record in records], features=STAGED_FEATURES)
    reader = pair_reader(name, source)
    scored = _score_columns(data.ranker)
    stream = source.stream if isinstance(source, PairSource) else ""
    assume_safe = isinstance(source, PairSource) and source.assume_safe

    def convert(values: dict[str, Any], number: int) -> dict[str, Any]:
        row = Row(values)
        reading = reader.read(row)
        record = pair_record(reading, stream=stream, source=name, row=number, assume_safe=assume_safe)
        scores = [row.number(column) for column in scored] or [None, None]
        return staged_pair(record, reading.dirt, (scores[0], scores[1]))

    return _staged(open_rows(name, source), source, reader, scored, convert, STAGED_FEATURES)


def stage_demos(name: str, source: Source) -> Dataset:
    """Every row of a source of conversations, in `arrow.DEMO_FEATURES`."""
    reader = demo_reader(name, source)

    def convert(values: dict[str, Any], number: int) -> dict[str, Any]:
        return dict(demo_record(reader.read(Row(values)), source=name, row=number))

    return _staged(open_rows(name, source), source, reader, (), convert, DEMO_FEATURES)


def staged_from(name: str, source: Source, data: Data) -> dict[str, Any]:
    """What determines the staged rows, as plain values: the data, its reading, the code."""
    reading = source.model_dump(exclude={"files", "hub", "revision", "split"})
    if source.reader == WORLD:
        return {**reading, "rows": world_options(name, source, data.seed), "code": code_version("world")}
    return {**reading, "rows": source_fingerprint(name, source)}


def _score_columns(ranker: Ranker) -> tuple[str, ...]:
    return tuple(ranker.columns or ()) if ranker.kind == "column" else ()


def _staged(
    rows: Rows,
    source: Source,
    reader: RowReader[Any],
    scored: tuple[str, ...],
    convert: Callable[[dict[str, Any], int], dict[str, Any]],
    features: Features,
) -> Dataset:
    """The rows converted one by one; a row that breaks the schema ends in a `UserError`."""
    present = rows.table.column_names
    for column in reader.required:
        if column not in present:
            raise UserError(
                f"{rows.where(0)}: column {column!r} is missing, which reader {source.reader!r} needs; "
                f"found: {', '.join(present)}"
            )
    used = [c for c in dict.fromkeys((*reader.required, *reader.optional, *scored)) if c in present]

    def read(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        columns = [batch[column] for column in used]
        records = []
        for number, *values in zip(numbers, *columns, strict=True):
            try:
                records.append(convert(dict(zip(used, values, strict=True)), number))
            except SchemaError as error:
                raise UserError(f"{rows.where(number)}, {error}") from None
        return {column: [record[column] for record in records] for column in features}

    made_of = [
        rows.name,
        rows.fingerprint,
        source.model_dump(mode="json"),
        scored,
        code_version(*RECORD_CODE),
    ]
    return derive(rows.table.select_columns(used), read, features, made_of)
