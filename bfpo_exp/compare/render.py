"""A comparison, or the paper's published rows, as text: terminal, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bfpo_exp.compare.settings import MISSING
from bfpo_exp.compare.table import LOWER_IS_BETTER, Cell, Comparison

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


@dataclass(frozen=True)
class Grid:
    """A table of texts, the form that every format starts from."""

    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    text_columns: int = 1  # how many columns from the left hold words; the others hold numbers
    best: frozenset[tuple[int, int]] = frozenset()  # (row, column) of the marked cells


def grid(comparison: Comparison) -> Grid:
    """A comparison as texts: one decimal, the best of each column marked.

    A column of an ``n`` stands before the scores where settings have different numbers of runs.
    """
    names = comparison.names or ("setting",)
    uneven = len({row.n for row in comparison.rows}) > 1
    header = (*names, *(("n",) if uneven else ()), *(heading(m) for m in comparison.metrics))
    left = len(header) - len(comparison.metrics)
    rows = tuple(
        (
            *(row.values or (row.label,)),
            *((str(row.n),) if uneven else ()),
            *(shown(row.cells[m]) for m in comparison.metrics),
        )
        for row in comparison.rows
    )
    best = {(r, left + c) for c, m in enumerate(comparison.metrics) for r in comparison.best(m)}
    return Grid(
        comparison.title,
        comparison.caption,
        header,
        rows,
        comparison.footnotes,
        len(names),
        frozenset(best),
    )


def heading(metric: str) -> str:
    """A metric's column title, with the direction that is better.

    >>> heading("eval/over_refusal"), heading("eval/savg")
    ('over-refusal ↓', 'savg ↑')
    """
    name = metric.removeprefix("eval/").replace("_", "-")
    return f"{name} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def shown(cell: Cell | None) -> str:
    """A score with its spread.

    >>> shown(Cell(62.04, 2.0, 3)), shown(Cell(62.04, None, 1))
    ('62.0 ± 2.0', '62.0')
    """
    if cell is None:
        return MISSING
    return f"{cell.mean:.1f}" + ("" if cell.sd is None else f" ± {cell.sd:.1f}")


def to_rich(grid: Grid, starred: bool = False) -> RenderableType:
    """A table for the terminal, set tightly to fit 80 columns, the best cells bold.

    ``starred`` marks them with a star as well, for where there are no colours.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for column, name in enumerate(grid.header):
        if column < grid.text_columns:
            table.add_column(Text(name), no_wrap=True)
        else:
            table.add_column(Text(name.replace("-", "-\n").replace(" ", "\n")), justify="right")
    for r, row in enumerate(grid.rows):
        cells = [value.replace(" ± ", "±") for value in row]
        table.add_row(*(_cell(grid, r, c, value, starred) for c, value in enumerate(cells)))
    below = (["* best of its column."] if starred and grid.best else []) + _below(grid)
    return Group(Text(grid.title, "bold"), table, "", *(Text(line, "dim") for line in below), "")


def _cell(grid: Grid, row: int, column: int, value: str, starred: bool) -> Text:
    from rich.text import Text

    best = (row, column) in grid.best
    # Numbers without a star keep its place free, so that they stay below each other.
    star = ("*" if best else " ") if starred and grid.best and column >= grid.text_columns else ""
    return Text(value + star, "bold green" if best else "")


def show(grid: Grid) -> None:
    """Print `to_rich` to the terminal; into a file or pipe, which has no width, plain and wide."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(to_rich(grid))
    else:
        print(to_text(grid), end="")


def to_text(grid: Grid, width: int = 120) -> str:
    """What `to_rich` shows, with stars for colours."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(to_rich(grid, starred=True))
    return captured.get()


def to_markdown(grid: Grid) -> str:
    """A Markdown table, the best cells bold."""
    rules = [":--" if c < grid.text_columns else "--:" for c in range(len(grid.header))]
    body = _marked(grid, lambda text: text.replace("|", "\\|"), lambda text: f"**{text}**")
    lines = [f"| {' | '.join(cells)} |" for cells in [grid.header, rules, *body]]
    below = [text for line in _below(grid) for text in ("", line)]
    return "\n".join([f"### {grid.title}", "", *lines, *below]) + "\n"


def to_latex(grid: Grid) -> str:
    """A LaTeX ``table`` (package booktabs), the best cells bold."""
    columns = "l" * grid.text_columns + "r" * (len(grid.header) - grid.text_columns)
    body = _marked(grid, _escape, lambda text: rf"\textbf{{{text}}}")
    rows = [" & ".join(cells) + r" \\" for cells in [[_escape(h) for h in grid.header], *body]]
    caption = " ".join([_sentence(grid.title), *_below(grid)])
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(comparison: Comparison) -> str:
    """Plain numbers at full precision: of each metric mean, sd and n; empty where missing."""
    columns = [f"{m} {part}" for m in comparison.metrics for part in ("mean", "sd", "n")]
    rows: list[list[object]] = []
    for row in comparison.rows:
        cells = [row.cells[m] for m in comparison.metrics]
        numbers = [x for c in cells for x in ((c.mean, c.sd, c.n) if c else (None, None, 0))]
        rows.append([*(row.values or (row.label,)), *numbers])
    return _csv([*(comparison.names or ("setting",)), *columns], rows)


def grid_to_csv(grid: Grid) -> str:
    """The texts of a grid as they are."""
    return _csv(grid.header, grid.rows)


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()


def _below(grid: Grid) -> list[str]:
    return [line for line in (grid.caption, *map(_sentence, grid.notes)) if line]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _marked(grid: Grid, escape: Callable[[str], str], mark: Callable[[str], str]) -> list[list[str]]:
    return [
        [mark(escape(v)) if (r, c) in grid.best else escape(v) for c, v in enumerate(row)]
        for r, row in enumerate(grid.rows)
    ]


_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    MISSING: "--",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "✓": r"$\checkmark$",
}


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
