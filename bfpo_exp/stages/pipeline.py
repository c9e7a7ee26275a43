"""All stages of a run, one after another: from a base model to the scores of a policy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from bfpo_exp.config.schema import Config
from bfpo_exp.data.card import card_metrics, dataset_card
from bfpo_exp.losses import is_staged
from bfpo_exp.models.output import ModelCard, Stage, card_text, model_card
from bfpo_exp.rewards.use import trains_reward_model
from bfpo_exp.stages.base import COUNTS, base_model, sft_model
from bfpo_exp.stages.context import Context, Weights, demo_mix, training_mix
from bfpo_exp.stages.evaluate import evaluate
from bfpo_exp.stages.online import SAMPLES
from bfpo_exp.stages.preference import policy, reference_pass, tokenised_stream
from bfpo_exp.stages.reward import PLOT, reward_model
from bfpo_exp.stages.reward import REPORT as REWARD_REPORT
from bfpo_exp.stages.soup import soup_card, soup_model
from bfpo_exp.tracking.tables import write_table

REPORT = "report.txt"  # what a run has to say beyond its scores


def pipeline(
    context: Context, artifacts: Path | None, enter: Callable[[str], None] = lambda stage: None
) -> None:
    """From a base model to the scores of a policy.

    ``artifacts`` is the folder for what users look at, and None where another process writes;
    ``enter`` is told which stage begins.
    """
    config = context.config
    if "soup" in config.stages:
        enter("soup")
        weights = soup_model(context)
    else:
        enter("base")
        weights = base_model(context)
    if "sft" in config.stages:
        enter("sft")
        weights = sft_model(context, weights)
    if {"reference", "preference"} & set(config.stages) or trains_reward_model(config):
        _describe_data(context, weights, artifacts)
    if trains_reward_model(config):
        enter("reward")
        _show_reward_model(reward_model(context, weights), artifacts)
    compares = bool({"reference", "preference"} & set(config.stages)) and not is_staged(config.loss)
    if compares and config.train.reference == "cached":
        enter("reference")
        reference_pass(_first_trained(context), weights)
    if "preference" in config.stages:
        enter("preference")
        weights = policy(context, weights)
    if artifacts and weights.own:
        _link(artifacts.parent / "model", Path(weights.path))
        if (samples := Path(weights.path) / SAMPLES).exists():
            shutil.copyfile(samples, artifacts / SAMPLES)
    if "evaluate" in config.stages:
        enter("evaluate")
        scores, responses = evaluate(context, weights)
        if artifacts is None:
            return
        context.metrics.append(0, scores)
        if responses:
            write_table(artifacts / "generations.json", responses)
        (artifacts / "model_card.md").write_text(card_text(_card(config, scores)))


def _card(config: Config, scores: Mapping[str, float]) -> ModelCard:
    """The card of the model that was evaluated."""
    if "soup" in config.stages:
        return soup_card(config, scores)
    stage: Stage = next((s for s in ("preference", "sft") if s in config.stages), "base")
    return model_card(config, stage, scores=scores)


def _show_reward_model(model: Weights, artifacts: Path | None) -> None:
    """A reward model's folder, its reliability and what is to be said of it, where users look for them."""
    if artifacts is None:
        return
    _link(artifacts.parent / "reward_model", Path(model.path))
    shutil.copy(Path(model.path, PLOT), artifacts / PLOT)
    shutil.copy(Path(model.path, REWARD_REPORT), artifacts / REPORT)


def _link(link: Path, target: Path) -> None:
    """A link where users look for a run's model."""
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))


def _first_trained(context: Context) -> Context:
    """The run at the first of its preference stages, whose reference is the model that it starts from."""
    while context.config.loss.first is not None:
        context = context.of_first_loss()
    return context


def _describe_data(context: Context, start: Weights, artifacts: Path | None) -> None:
    """The data set's card, and its counts as metrics."""
    data = context.config.data
    pairs = training_mix(data)
    tokens = {
        f"pairs_{stream}": json.loads((tokenised_stream(context, stream) / COUNTS).read_text())
        for stream in data.streams
    }
    if artifacts is None:
        return
    demos = None
    if "sft" in context.config.stages:
        demos = demo_mix(data)
        tokens["demonstrations"] = json.loads((Path(start.path) / COUNTS).read_text())
    (artifacts / "dataset_card.md").write_text(dataset_card(data, pairs, demos, tokens))
    context.metrics.append(0, card_metrics(pairs, demos, tokens))
