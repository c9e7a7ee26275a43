"""Tables in the JSON that MLflow's table viewer and `load_table` read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOGGED_ARTIFACTS = "mlflow.loggedArtifacts"  # the tag by which MLflow finds a run's tables
_HEAD = '{"columns": '


def write_table(path: Path | str, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as pandas' ``split`` orientation without an index.

    The suffix is ``.json``.  NaN and infinities, which a browser cannot read, become null.
    Raises `ValueError` for columns of different lengths.
    """
    rows = [[_readable(cell) for cell in row] for row in zip(*columns.values(), strict=True)]
    body = json.dumps({"columns": list(columns), "data": rows}, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(body, encoding="utf-8")


def _readable(cell: Any) -> Any:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def is_table(path: Path) -> bool:
    """Whether `write_table` wrote this file."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD.encode()


def tables_tag(artifacts: Sequence[str]) -> dict[str, str]:
    """The tag that makes MLflow show these artifacts as tables; none for no artifacts."""
    if not artifacts:
        return {}
    return {LOGGED_ARTIFACTS: json.dumps([{"path": path, "type": "table"} for path in artifacts])}
