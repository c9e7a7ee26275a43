"""How good a reward model is on pairs that were held out, and how far its numbers are probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bfpo_exp.compare.figures import GREY, PALETTE, figure, save
from bfpo_exp.config.rewards import Head, Heads

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Probabilities in bins of equal width that hold any; float64 (bins,) each.

    Attributes:
        predicted: mean probability of a bin.
        observed: mean outcome, which equals it where the probabilities are calibrated.
        counts: predictions in it.
    """

    predicted: np.ndarray
    observed: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, probabilities: np.ndarray, outcomes: np.ndarray) -> Reliability:
        """Of probabilities in [0, 1] and what came of them, 0 to 1; (n,) each."""
        bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        some = counts > 0
        sums = [np.bincount(bins, weights=values, minlength=BINS) for values in (probabilities, outcomes)]
        predicted, observed = (values[some] / counts[some] for values in sums)
        return cls(predicted, observed, counts[some].astype(float))

    @property
    def error(self) -> float:
        """The expected calibration error: the bins' mean distance of predicted and observed, by count.

        After Naeini et al., 2015.

        >>> Reliability.of(np.array([0.9, 0.9, 0.2]), np.array([1.0, 0.0, 0.0])).error
        0.3333333333333333
        """
        distance = np.abs(self.predicted - self.observed)
        return float((distance * self.counts).sum() / self.counts.sum())


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve: the chance that a positive scores above a negative, ties half.

    ``scores`` float (n,), ``positive`` bool (n,); NaN where all are of one kind.

    >>> auc(np.array([3.0, 1.0, 2.0, 2.0]), np.array([True, False, True, False]))
    0.875
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1, the mean of ties
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


@dataclass(frozen=True)
class Quality:
    """A reward model on held-out pairs: metrics by name (docs/metrics.md), reliability by head."""

    values: dict[str, float]
    reliability: dict[str, Reliability]

    @property
    def lines(self) -> list[str]:
        """What it comes to, a line for each head that was measured."""
        known = {"safety_auc": float("nan"), **self.values}
        told = {
            "helpfulness": "{helpfulness_accuracy:.1%} of {helpfulness_heldout:.0f} held-out orders right "
            "(chance 50.0%), calibration error {helpfulness_ece:.3f}, Brier {helpfulness_brier:.3f}",
            "safety": "{safety_accuracy:.1%} of {safety_heldout:.0f} held-out labels right (majority "
            "{safety_majority:.1%}), AUC {safety_auc:.3f}, calibration error {safety_ece:.3f}, Brier "
            "{safety_brier:.3f}",
        }
        return [f"{name}: {told[name].format_map(known)}" for name in self.reliability]

    def plot(self, path: Path, title: str) -> Path:
        """Reliability diagrams: predicted probability and what came of it, a panel for each head."""
        with figure(7.2, 3.6) as drawn:
            panels = drawn.subplots(1, 2, sharex=True, sharey=True)
            for axes, color, (name, bins) in zip(panels, PALETTE, self.reliability.items(), strict=False):
                axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
                axes.plot(bins.predicted, bins.observed, color=color, linewidth=1.2)
                sizes = 12 + 200 * bins.counts / bins.counts.sum()
                axes.scatter(bins.predicted, bins.observed, s=sizes, color=color)
                accuracy, ece = self.values[f"{name}_accuracy"], self.values[f"{name}_ece"]
                axes.set_title(f"{name}: {accuracy:.1%} right, calibration error {ece:.3f}", fontsize=9)
            drawn.suptitle(title, x=0.01, ha="left", fontsize=10.5)
            drawn.supxlabel("predicted probability; points are as large as their share", fontsize=9)
            drawn.supylabel("what was observed", fontsize=9)
            return save(drawn, path)


def measured(logits: Mapping[str, np.ndarray], ordered: np.ndarray, safe: np.ndarray) -> Quality:
    """The quality of the heads' logits, float (n, 2) by reward, for the two responses of n held-out pairs.

    ``ordered``, bool (n,), says where the first response is known to be the more helpful one; ``safe``,
    float (n, 2), holds the labels, NaN where there is none.  A head without any held-out label is
    left out.
    """
    values: dict[str, float] = {}
    reliability = {}
    if ordered.any():
        helpful = logits["helpfulness"][ordered]
        margins = helpful[:, 0] - helpful[:, 1]
        # Which response stands first says nothing, so every pair counts both ways round.
        chances = _sigmoid(np.concatenate([margins, -margins]))
        outcomes = np.repeat([1.0, 0.0], len(margins))
        reliability["helpfulness"] = Reliability.of(chances, outcomes)
        values |= {
            "helpfulness_accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()),
            "helpfulness_brier": float(((chances - outcomes) ** 2).mean()),
            "helpfulness_ece": reliability["helpfulness"].error,
            "helpfulness_heldout": len(margins),
        }
    known = ~np.isnan(safe)
    if known.any():
        scores, labels = logits["safety"][known], safe[known]
        chances, positive = _sigmoid(scores), labels >= 0.5
        reliability["safety"] = Reliability.of(chances, labels)
        values |= {
            "safety_accuracy": float(((scores > 0) == positive).mean()),
            "safety_majority": float(max(positive.mean(), 1 - positive.mean())),
            "safety_auc": auc(scores, positive),
            "safety_brier": float(((chances - labels) ** 2).mean()),
            "safety_ece": reliability["safety"].error,
            "safety_heldout": len(labels),
        }
    return Quality({name: value for name, value in values.items() if not np.isnan(value)}, reliability)


def heads_of(trained: Mapping[str, np.ndarray]) -> Heads:
    """How the outputs become rewards, from their logits for the trained responses, float (n, 2) by reward.

    The centre of helpfulness is the mean logit: sigmoid(r - centre) is then, by Bradley-Terry, the
    probability to be preferred to an average response.  That of safety is 0, where its label is even.
    """
    centre = float(trained["helpfulness"].mean())
    return Heads(
        helpfulness=Head(output="helpfulness", centre=centre, scale=1.0, squash="sigmoid"),
        safety=Head(output="safety", centre=0.0, scale=1.0, squash="sigmoid"),
    )


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -values))
