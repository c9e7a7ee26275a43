"""Readers by name: what a row of each public schema means.

A reader is a function of the source's name and config that gives a `RowReader`; a new schema is
one function and one line here.
"""

from __future__ import annotations

from bfpo_exp.config.data import Source
from bfpo_exp.data.readers.base import DemoReading, Factory, PairReading, RowReader
from bfpo_exp.data.readers.columns import columns
from bfpo_exp.data.readers.demos import ultrachat
from bfpo_exp.data.readers.pairs import hh_rlhf, pku_saferlhf, red_team, ultrafeedback
from bfpo_exp.errors import UserError, unknown

WORLD = "world"  # not a schema of rows: it generates records (see `readers.world`)

PAIR_READERS: dict[str, Factory[PairReading]] = {
    "pku_saferlhf": pku_saferlhf,
    "ultrafeedback": ultrafeedback,
    "hh_rlhf": hh_rlhf,
    "red_team": red_team,
    "columns": columns,
}
DEMO_READERS: dict[str, Factory[DemoReading]] = {"ultrachat": ultrachat}


def pair_reader(name: str, source: Source) -> RowReader[PairReading]:
    """The reader of a source of pairs; a `UserError` for a name that reads none."""
    if source.reader not in PAIR_READERS:
        raise unknown(f"reader of pairs in source {name!r}", source.reader, [*PAIR_READERS, WORLD])
    _no_columns(name, source)
    return PAIR_READERS[source.reader](name, source)


def demo_reader(name: str, source: Source) -> RowReader[DemoReading]:
    """The reader of a source of conversations; a `UserError` for a name that reads none."""
    if source.reader not in DEMO_READERS:
        raise unknown(f"reader of conversations in source {name!r}", source.reader, DEMO_READERS)
    _no_columns(name, source)
    return DEMO_READERS[source.reader](name, source)


def _no_columns(name: str, source: Source) -> None:
    if source.columns and source.reader != "columns":
        raise UserError(
            f"source {name!r}: reader {source.reader!r} has its own column names; set columns={{}}, "
            "or use reader=columns"
        )
