"""The generic reader: preference data of any flat schema, by naming its columns.

``columns`` of the source maps fields to column names:

| field | what the column holds | |
|---|---|---|
| `prompt` | text, or messages that end with the user's turn | required |
| `response_0`, `response_1` | two texts | both, or |
| `chosen`, `rejected` | two texts, the preferred one first | both of these |
| `safe_0`, `safe_1` | safety labels, of chosen and rejected too: see `rows.Row.safety` | optional |
| `better` | index 0 or 1 of the more helpful response, or null | optional |
| `safer` | index 0 or 1 of the safer response, or null | optional |

With `chosen` and `rejected`, ``options.preference`` says what they were chosen for, `helpfulness` or
`safety`; the column of that order is then not mapped.
"""

from __future__ import annotations

from bfpo_exp.config.data import Source
from bfpo_exp.data.readers.base import Index, NoOptions, PairReading, RowReader, read_options
from bfpo_exp.data.readers.pairs import INDEX, Preference, orders
from bfpo_exp.data.readers.rows import Row
from bfpo_exp.errors import UserError, unknown

FIELDS = ("prompt", "response_0", "response_1", "chosen", "rejected", "safe_0", "safe_1", "better", "safer")


def columns(name: str, source: Source) -> RowReader[PairReading]:
    """A reader by the source's own column names (see this module's table)."""
    mapped = source.columns
    for field in mapped:
        if field not in FIELDS:
            raise unknown(f"field in columns of source {name!r}", field, FIELDS)
    preferred = {"chosen", "rejected"} <= mapped.keys()
    numbered = {"response_0", "response_1"} <= mapped.keys()
    if "prompt" not in mapped or preferred == numbered:
        raise UserError(
            f"source {name!r}: columns maps {', '.join(mapped) or 'nothing'}; reader 'columns' needs prompt, "
            "and either chosen and rejected, or response_0 and response_1"
        )
    better: Index | None = None
    safer: Index | None = None
    if preferred:
        better, safer = orders(read_options(Preference, name, source))
        stated = "safer" if better is None else "better"
        if stated in mapped:
            raise UserError(f"source {name!r}: columns maps {stated}, but chosen is the {stated} one already")
    else:
        read_options(NoOptions, name, source)
    first, second = ("chosen", "rejected") if preferred else ("response_0", "response_1")

    def read(row: Row) -> PairReading:
        def index(field: str, otherwise: Index | None) -> Index | None:
            return row.choice(mapped[field], INDEX) if field in mapped else otherwise

        def label(field: str) -> float | None:
            return row.safety(mapped[field]) if field in mapped else None

        return PairReading(
            prompt=row.prompt(mapped["prompt"]),
            responses=(row.text(mapped[first]), row.text(mapped[second])),
            better=index("better", better),
            safe=(label("safe_0"), label("safe_1")),
            safer=index("safer", safer),
        )

    return RowReader(read, required=tuple(mapped.values()))
