"""What a reader is, and how what it read becomes the canonical record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from bfpo_exp.config.data import Source
from bfpo_exp.config.types import Strict
from bfpo_exp.data.readers.rows import Row
from bfpo_exp.data.records import DemoRecord, Message, PairRecord
from bfpo_exp.errors import UserError, unknown

Index = Literal[0, 1]
R = TypeVar("R")
O = TypeVar("O", bound=Strict)  # noqa: E741


class PairReading(NamedTuple):
    """One row of preference data, its two responses in the order of the source.

    ``better`` and ``safer`` are the index of the more helpful and of the safer response, ``safe``
    the safety labels; None where the data does not say.  ``dirt`` is a reason to drop the row
    which only the reader can see ("tie", "prompt_mismatch"), or "".
    """

    prompt: list[Message]
    responses: tuple[str, str]
    better: Index | None = None
    safe: tuple[float | None, float | None] = (None, None)
    safer: Index | None = None
    dirt: str = ""


class DemoReading(NamedTuple):
    """One demonstration as read."""

    prompt: list[Message]
    response: str


@dataclass(frozen=True)
class RowReader(Generic[R]):
    """A schema: the columns that a source must have and may have, and how one row reads."""

    read: Callable[[Row], R]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


Factory = Callable[[str, Source], RowReader[R]]


class NoOptions(Strict):
    """The options of a reader without any."""


def read_options(schema: type[O], name: str, source: Source) -> O:
    """The source's options by the reader's schema; a `UserError` for an unknown or wrong one."""
    try:
        return schema.model_validate(source.options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        raise unknown(f"option of reader {source.reader!r} in source {name!r}", key, schema.model_fields)
    given = "has no value" if first["type"] == "missing" else f"is {first['input']!r}"
    field = schema.model_fields[key]
    raise UserError(
        f"source {name!r}: option {key!r} of reader {source.reader!r} {given}; it is {field.description}"
    )


def implied_safer(safe: tuple[float | None, float | None]) -> Index | None:
    """Which response is safer by its label: the safe one, where exactly one is safe.

    >>> implied_safer((0.0, 1.0)), implied_safer((1.0, 1.0)), implied_safer((1.0, None))
    (1, None, None)
    """
    if safe == (1.0, 0.0):
        return 0
    return 1 if safe == (0.0, 1.0) else None


def pair_record(reading: PairReading, *, stream: str, source: str, row: int, assume_safe: bool) -> PairRecord:
    """The canonical record: (more helpful, less helpful) where the row says which is which.

    ``assume_safe`` labels safe what has no label; labels of the data stay.
    """
    safer = implied_safer(reading.safe) if reading.safer is None else reading.safer
    safe = [1.0 if label is None and assume_safe else label for label in reading.safe]
    w = reading.better or 0
    return PairRecord(
        prompt=reading.prompt,
        response_w=reading.responses[w],
        response_l=reading.responses[1 - w],
        ordered=reading.better is not None,
        ranker="none" if reading.better is None else "data",
        safe_w=safe[w],
        safe_l=safe[1 - w],
        safer=None if safer is None else ("w" if safer == w else "l"),
        stream=stream,
        source=source,
        row=row,
    )


def demo_record(reading: DemoReading, *, source: str, row: int) -> DemoRecord:
    """The demonstration as a record."""
    return DemoRecord(prompt=reading.prompt, response=reading.response, source=source, row=row)


def staged_pair(record: PairRecord, dirt: str = "", scores: tuple[Any, Any] = (None, None)) -> dict[str, Any]:
    """A row of `arrow.STAGED_FEATURES`; an ordered pair needs no scores."""
    score_w, score_l = (None, None) if record["ordered"] else scores
    return {**record, "dirt": dirt, "score_w": score_w, "score_l": score_l}
