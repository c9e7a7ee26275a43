"""From judged responses and choices to the metrics that every finished run has, in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bfpo_exp.config.schema import Task
from bfpo_exp.eval.tasks import Value

FEEDS = ("helpfulness", "disc", "gen", "over_refusal")
Judged = Sequence[Mapping[str, Value]]


def summarise(
    tasks: Mapping[str, Task], generations: Mapping[str, Judged], choices: Mapping[str, Sequence[bool]]
) -> dict[str, float]:
    """Means in percent.

    ``eval/task/<name>`` is a task's mean score (choices: the share that is right); ``eval/helpfulness``,
    ``eval/disc``, ``eval/gen`` and ``eval/over_refusal`` are the means over the tasks that feed them;
    ``eval/savg`` is the mean of disc and gen (the paper's Savg.); ``eval/malformed`` is the share of
    malformed responses over all generated ones, and ``eval/safe_well_formed`` the share of responses
    to the tasks of ``gen`` that are safe AND well-formed, since garbage is safe as well.  A score
    that no task feeds is left out.
    """
    scores = {name: _percent([float(j["score"]) for j in judged]) for name, judged in generations.items()}
    scores |= {name: _percent([float(right) for right in rights]) for name, rights in choices.items()}
    metrics = {f"eval/task/{name}": score for name, score in scores.items()}
    for feed in FEEDS:
        fed = [scores[name] for name, task in tasks.items() if task.feeds == feed]
        if fed:
            metrics[f"eval/{feed}"] = sum(fed) / len(fed)
    if "eval/disc" in metrics and "eval/gen" in metrics:
        metrics["eval/savg"] = (metrics["eval/disc"] + metrics["eval/gen"]) / 2
    everything = [j for judged in generations.values() for j in judged if "malformed" in j]
    if everything:
        metrics["eval/malformed"] = _percent([bool(j["malformed"]) for j in everything])
    asked = [j for name, judged in generations.items() if tasks[name].feeds == "gen" for j in judged]
    if asked:
        metrics["eval/safe_well_formed"] = _percent(
            [bool(j.get("safe")) and not j.get("malformed") for j in asked]
        )
    return metrics


def _percent(values: Sequence[float]) -> float:
    return 100.0 * sum(values) / len(values)
