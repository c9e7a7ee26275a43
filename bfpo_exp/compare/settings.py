"""Which params tell the settings of a sweep apart, and which runs are repeats of one setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

SEED = "seed"
MISSING = "\u2013"  # an en dash: the value of a param that a run does not have
Params = Mapping[str, str]

# Config choices that stand for many values at once, the most telling first.  What differs between
# runs only because the choice differs (a loss's hyper-parameters, a method's data) is implied.
CHOICES = ("method", "loss.name", "model.name", "data.name", "deepspeed.name", "eval.name")


def identifying(runs: Sequence[Params]) -> list[str]:
    """The params that identify a setting, in the order in which a table shows them.

    They are chosen greedily: the choices first, then the other params that vary, dropping what
    follows the seed and what those chosen before already imply.  Where nothing varies, the method
    or the loss names the one row.

    >>> dpo = {"method": "dpo", "loss.beta": "0.1"}
    >>> bfpo = {"method": "bfpo", "loss.beta": "0.2"}
    >>> seeds = [{"seed": s, "eval.seed": s} for s in "01"]
    >>> identifying([{**m, **s} for m in (dpo, bfpo) for s in seeds])
    ['method']
    """
    names = dict.fromkeys(name for run in runs for name in run)
    varying = [
        name
        for name in names
        if name != SEED and len(set(_column(runs, name))) > 1 and not _follows_seed(runs, name)
    ]
    settings = len(set(_rows(runs, varying)))
    chosen: list[str] = []
    for name in [c for c in CHOICES if c in varying] + sorted(set(varying) - set(CHOICES)):
        if not _implied(runs, name, chosen, settings):
            chosen.append(name)
    return chosen or _common_choice(runs)


def grouped(runs: Sequence[Params], names: Sequence[str]) -> dict[tuple[str, ...], list[int]]:
    """The numbers of the runs of each setting.

    Settings stand in numerical order of their numbers; words in the order of their first run.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, values in enumerate(_rows(runs, names)):
        groups.setdefault(values, []).append(number)
    order = [_ranks(_column(runs, name)) for name in names]
    ranked = sorted(groups, key=lambda values: [rank[v] for rank, v in zip(order, values, strict=True)])
    return {values: groups[values] for values in ranked}


def short_names(names: Sequence[str]) -> list[str]:
    """The telling part of each dotted name, or the whole where two would be the same.

    >>> short_names(["loss.name", "loss.beta", "data.seed", "eval.seed"])
    ['loss', 'beta', 'data.seed', 'eval.seed']
    """
    short = [name.removesuffix(".name").rpartition(".")[2] for name in names]
    return [s if short.count(s) == 1 else name for s, name in zip(short, names, strict=True)]


def number(text: str) -> float | None:
    """The number that a param's text is, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def _common_choice(runs: Sequence[Params]) -> list[str]:
    known = runs[0] if runs else {}
    return [c for c in ("method", "loss.name") if known.get(c, "null") != "null"][:1]


def _follows_seed(runs: Sequence[Params], name: str) -> bool:
    """Whether the param is a function of the seed alone.

    It has to equal the seed, or some seed has to occur twice: where every run has a seed of its
    own, any param is such a function, and to drop it would merge settings that differ.
    """
    seeds, values = _column(runs, SEED), _column(runs, name)
    return values == seeds or (len(set(seeds)) < len(seeds) and _is_function(seeds, values))


def _implied(runs: Sequence[Params], name: str, chosen: Sequence[str], settings: int) -> bool:
    """Whether the choices, or one other param, determine this one.

    A param that has another value in each setting determines every other by accident (a random
    search, say), so such a one only counts as the reason for a param that equals it.
    """
    values = _column(runs, name)
    choices = [c for c in chosen if c in CHOICES]
    if choices and _is_function(_rows(runs, choices), values):
        return True
    for other in chosen:
        reason = _column(runs, other)
        if reason == values or (len(set(reason)) < settings and _is_function(reason, values)):
            return True
    return False


def _is_function(inputs: Sequence[object], outputs: Sequence[str]) -> bool:
    return len(set(zip(inputs, outputs, strict=True))) == len(set(inputs))


def _column(runs: Iterable[Params], name: str) -> list[str]:
    return [run.get(name, MISSING) for run in runs]


def _rows(runs: Iterable[Params], names: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(run.get(name, MISSING) for name in names) for run in runs]


def _ranks(column: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Where each value of a column stands: words by first appearance, then numbers by size."""
    distinct = list(dict.fromkeys(column))
    return {v: (0, float(place)) if (n := number(v)) is None else (1, n) for place, v in enumerate(distinct)}
