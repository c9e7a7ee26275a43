"""From the results to the page: ``python -m benchmarks.report`` makes the tables and the plots anew.

Between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` docs/performance.md holds the tables of a section
of docs/performance.json; all other text of the page is written by hand, and stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.plot import draw
from benchmarks.sheets import SHEETS, environment

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE = DOCS / "performance.json", DOCS / "performance.md"
PLOTS = {"step": DOCS / "images" / "performance.png", "step_gpu": DOCS / "images" / "performance_gpu.png"}
BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def main() -> None:
    """Write page and plots."""
    results = json.loads(RESULTS.read_text())
    PAGE.write_text(filled(PAGE.read_text(), results))
    for name, path in PLOTS.items():
        if name in results:
            draw(results[name], path)


def filled(page: str, results: dict[str, Any]) -> str:
    """The page with its blocks made anew; a section that was not measured says so."""
    return BLOCK.sub(lambda found: found[1] + _block(found[2], results) + found[3], page)


def _block(name: str, results: dict[str, Any]) -> str:
    if name not in results:
        return "Not measured yet.\n"
    sheets = [sheet(results[name]) for sheet in SHEETS[name]]
    parts = [f"*{environment(results[name])}*", *(f"**{s.title}**\n\n{s.markdown()}" for s in sheets)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
