"""Pairs of the generated world: no files, no schema, only parameters."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from bfpo_exp.config.data import PairSource, Source
from bfpo_exp.config.types import Count, Share, StreamName, Strict
from bfpo_exp.data.readers.base import read_options
from bfpo_exp.data.records import PairRecord
from bfpo_exp.errors import UserError


class WorldOptions(Strict):
    """How the pairs are generated."""

    rows: Count | None = Field(None, description="how many pairs to generate, a whole number (default: size)")
    unscreened: Share = Field(0.0, description="the share of harmful prompts labelled safe, from 0 to 1")
    label_noise: Share = Field(0.0, description="the share of flipped safety labels, from 0 to 1")
    stream: StreamName | None = Field(
        None, description="helpfulness or safety, for demonstrations (pairs have data.pairs.<source>.stream)"
    )


def world_options(name: str, source: Source, seed: int) -> dict[str, Any]:
    """The arguments of ``bfpo_exp.world.pairs``, which determine what it generates."""
    if source.hub is not None or source.files is not None:
        raise UserError(f"source {name!r}: reader 'world' generates its rows; set hub=null and files=null")
    options = read_options(WorldOptions, name, source)
    rows = source.size if options.rows is None and type(source.size) is int else options.rows
    if rows is None:
        raise UserError(
            f"source {name!r}: reader 'world' generates as many rows as options.rows says; set it"
        )
    if isinstance(source, PairSource) and options.stream is not None:
        raise UserError(
            f"source {name!r}: options.stream is for demonstrations; the pairs' is stream={source.stream}"
        )
    stream = source.stream if isinstance(source, PairSource) else options.stream
    if stream is None:
        raise UserError(f"source {name!r}: options.stream has no value; allowed: helpfulness, safety")
    return {
        "stream": stream,
        "size": rows,
        "seed": seed,
        "unscreened": options.unscreened,
        "label_noise": options.label_noise,
        "split": source.split,
    }


def world_pairs(name: str, source: Source, seed: int) -> list[PairRecord]:
    """The generated records under the source's name, numbered as they come."""
    from bfpo_exp import world

    records = world.pairs(**world_options(name, source, seed))
    return [PairRecord(**{**record, "source": name, "row": row}) for row, record in enumerate(records)]
