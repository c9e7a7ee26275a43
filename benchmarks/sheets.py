"""The tables that are made of the results; each can be shown on a terminal and written to a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table

Results = dict[str, Any]
NAMES = {"live": "live", "cached": "ahead"}  # of a reference
SIDES = {"ours": "ours", "trl": "TRL"}


@dataclass(frozen=True)
class Sheet:
    """A table of texts; all columns but the first are aligned to the right."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table alone, without its title."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def terminal(self) -> Table:
        """The table with its title."""
        made = Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            made.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            made.add_row(*map(escape, row))
        return made


def environment(section: Results) -> str:
    """One line: where, with what and when."""
    m = section["machine"]
    hardware = f"{m['processor']}, {m['cores']} cores, {m['memory_gb']:.0f} GB"
    gpu = f", {m['gpu']}" if m["gpu"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in m["packages"].items())
    return f"{hardware}{gpu}; Python {m['python']}, {versions}; {m['date']}"


def speed(section: Results) -> Sheet:
    """Pairs a second of both sides."""
    rows = []
    for ours, trl in _duels(section):
        ratio = median(ours["pairs_per_second"]) / median(trl["pairs_per_second"])
        rows.append([*_names(ours), _spread(ours), _spread(trl), f"{ratio:.2f}"])
    return Sheet(
        "Pairs a second: median (least to most)",
        ["pairs", "trained", "reference", "ours", "TRL", "ours / TRL"],
        rows,
    )


def defaults(section: Results) -> Sheet:
    """Both sides as their users find them."""
    rows = []
    for ours, trl in _duels(section):
        ratio = median(ours["pairs_per_second"]) / median(trl["pairs_per_second"])
        peaks = f"{ours['peak_gb']:.2f} / {trl['peak_gb']:.2f}"
        rows.append([ours["profile"], ours["trained"], _spread(ours), _spread(trl), f"{ratio:.2f}", peaks])
    header = ["pairs", "trained", "ours", "TRL", "ours / TRL", "peak GB"]
    return Sheet("By default, pairs a second: median (least to most)", header, rows)


def use(section: Results) -> Sheet:
    """Useful tokens a second, the share of the matrix products' rate, peak memory: ours / TRL's."""
    rows = []
    for ours, trl in _duels(section):
        sides = (ours, trl)
        rate = section["rates"][ours["profile"]]
        rows.append(
            [
                *_names(ours),
                " / ".join(f"{median(side['tokens_per_second']):,.0f}" for side in sides),
                *(
                    " / ".join(f"{median(side['operations_per_second']) / rate[of]:.0%}" for side in sides)
                    for of in ("own", "square")
                ),
                " / ".join(f"{side['peak_gb']:.2f}" for side in sides),
            ]
        )
    header = ["tokens/s", "of its own products", "of a square one", "peak GB"]
    return Sheet("Use of the machine: ours / TRL", ["pairs", "trained", "reference", *header], rows)


def rates(section: Results) -> Sheet:
    """The rates of matrix products that shares are given of."""
    rows = [
        [profile, f"{found['own'] / 1e9:,.0f}", f"{found['square'] / 1e9:,.0f}"]
        for profile, found in section["rates"].items()
    ]
    return Sheet("Matrix products alone, GFLOP/s", ["pairs", "the model's own", "a square one"], rows)


def tuning(section: Results) -> Sheet:
    """Both sides by the size of the micro-batch."""
    rows = []
    for side, profiles in section["found"].items():
        for profile, of in profiles.items():
            cells = [f"{at['pairs_per_second']:.2f}, {at['peak_gb']:.1f} GB" for at in of.values()]
            rows.append([f"{SIDES[side]}, {profile}", *cells])
    header = ["", *map(str, section["microbatches"])]
    return Sheet("Pairs a second and peak memory, by pairs a micro-batch", header, rows)


def sweep(section: Results) -> Sheet:
    """Our sweeps and TRL's runs, of which the first ones are timed."""
    rows = [[f"ours, {name}", f"{seconds:.0f}", ""] for name, seconds in section["ours"].items()]
    for way in section["trl"]:
        timed = ", ".join(f"{seconds:.0f}" for seconds in way["timed"])
        rows.append([f"TRL, dpo, {section['runs']} runs, {way['name']}", f"{way['seconds']:.0f}", timed])
    return Sheet("Sweeps from end to end", ["", "seconds", "of which timed"], rows)


def scaling(section: Results) -> Sheet:
    """Seconds of our step along each axis."""
    rows = [
        [f"{axis} {point['at']:,}", f"{point['seconds']:.2f}", f"{point['tokens_per_second']:,.0f}",
         f"{point['peak_gb']:.2f}"]
        for axis, points in section["axes"].items()
        for point in points
    ]  # fmt: skip
    return Sheet("The cost of our step", ["", "seconds a step", "tokens/s", "peak GB"], rows)


def stages(section: Results) -> Sheet:
    """The stages of the default run."""
    rows = [
        [name, f"{stage['first']:.1f}", f"{stage['again']:.1f}"] for name, stage in section["seconds"].items()
    ]
    return Sheet("Stages of the default run, seconds", ["stage", "first time", "again"], rows)


# By section of the results: the tables that are made of it.
SHEETS: dict[str, list[Callable[[Results], Sheet]]] = {
    "defaults": [defaults],
    "step": [speed, use, rates],
    "step_gpu": [speed, use, rates],
    "tuning": [tuning],
    "sweep": [sweep],
    "scaling": [scaling],
    "stages": [stages],
}


def _duels(section: Results) -> list[tuple[Results, Results]]:
    rows = section["rows"]
    return list(zip(rows[::2], rows[1::2], strict=True))


def _names(row: Results) -> list[str]:
    return [row["profile"], row["trained"], NAMES[row["reference"]]]


def _spread(row: Results) -> str:
    speeds = row["pairs_per_second"]
    return f"{median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"
