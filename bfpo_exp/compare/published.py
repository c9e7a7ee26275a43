"""The paper's own rows, shown beside a user's runs and never mixed with them."""

from __future__ import annotations

from pathlib import Path

import yaml

from bfpo_exp.compare.render import Grid
from bfpo_exp.errors import unknown

FILE = Path(__file__).with_name("published.yaml")
TABLES = ("table2", "table3", "table4")
CAPTION = "As printed: another model, other data and other judges than a sweep of yours."


def published(name: str) -> list[Grid]:
    """The parts of one of the paper's tables; `UserError` for another name than `TABLES`."""
    if name not in TABLES:
        raise unknown("published table", name, TABLES)
    return [
        Grid(
            title=part["title"],
            caption=CAPTION,
            header=tuple(part["columns"]),
            rows=tuple(map(tuple, part["rows"])),
            notes=tuple(part["notes"]),
        )
        for part in yaml.safe_load(FILE.read_text(encoding="utf-8"))[name]
    ]
