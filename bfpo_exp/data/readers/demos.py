"""Demonstrations for supervised fine-tuning."""

from __future__ import annotations

from bfpo_exp.config.data import Source
from bfpo_exp.data.readers.base import DemoReading, NoOptions, RowReader, read_options
from bfpo_exp.data.readers.rows import Row, SchemaError


def ultrachat(name: str, source: Source) -> RowReader[DemoReading]:
    """UltraChat: the last assistant turn is the response, all before it the prompt."""
    read_options(NoOptions, name, source)

    def read(row: Row) -> DemoReading:
        turns = row.messages("messages")
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if last == 0:
            raise SchemaError("messages", f"{len(turns)} turns", "an assistant's turn after another")
        return DemoReading(turns[:last], turns[last]["content"])

    return RowReader(read, required=("messages",))
