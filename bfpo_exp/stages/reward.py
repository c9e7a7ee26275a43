"""The stage that trains a reward model, and the rewards that a run's config asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_from_disk

from bfpo_exp.config.rewards import ClassifierReward, Combination, Fitted, Heads, Judge, Linear
from bfpo_exp.config.rewards import Weights as RewardWeights
from bfpo_exp.data.draw import is_held_out
from bfpo_exp.data.pairs import TokenisedPairs, order_signs
from bfpo_exp.distributed import group, wait
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version
from bfpo_exp.models.output import CARD, ModelCard, card_text, model_card
from bfpo_exp.rewards.classifier import classifier_fingerprint, classifier_scorer, load_classifier
from bfpo_exp.rewards.combine import fitted_weights
from bfpo_exp.rewards.judge import judge_rewards
from bfpo_exp.rewards.pairs import RewardPairs
from bfpo_exp.rewards.quality import Quality, heads_of, measured
from bfpo_exp.rewards.scorer import REWARDS, Scorer, finite, shared_out
from bfpo_exp.rewards.training import RewardObjective, new_reward_model, select_trained
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.stages.base import COUNTS, METRICS, chat_format, require_finite, run_stage
from bfpo_exp.stages.context import Context, Weights
from bfpo_exp.stages.preference import tokenised_stream
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train.loop import total_steps

HEADS = "rewards.json"  # beside a reward model's weights: how its outputs become rewards
PLOT, REPORT = "reward_model.png", "report.txt"
WEIGHTS = "weights.json"
SPLIT = "reward model"  # another half of the prompts than data.heldout


def scorer(context: Context, start: Weights) -> Scorer:
    """Who rewards responses in this run; a learnt reward model is trained from ``start`` if there is none.

    It is called with texts, by each process for its own.  A reward that is no finite number raises
    `UserError`.
    """
    reward = context.config.reward
    if isinstance(reward, Judge):
        return finite(judge_rewards)
    if isinstance(reward, ClassifierReward):
        return finite(classifier_scorer(load_classifier(reward.model, "reward.model"), reward.heads))
    folder = reward_model(context, start).path
    heads = Heads.model_validate_json(Path(folder, HEADS).read_text())
    return finite(classifier_scorer(load_classifier(folder, "reward", context.config.data.format), heads))


def scorer_made_of(context: Context, start: Weights) -> dict[str, Any]:
    """What determines the rewards that `scorer` gives, for the keys of results made with them."""
    reward = context.config.reward
    code = code_version("rewards/classifier", "rewards/judge", "data/chat")
    if isinstance(reward, Judge):
        return {"kind": reward.kind, "code": code_version("rewards/judge", "world")}
    if isinstance(reward, ClassifierReward):
        return {**reward.model_dump(), "model": classifier_fingerprint(reward.model), "code": code}
    return {"kind": reward.kind, "model": reward_model(context, start).key, "code": code}


def reward_model(context: Context, sft: Weights) -> Weights:
    """A sequence classifier with the two rewards as outputs, on the SFT model's backbone.

    Trained on the pairs of all streams of the mix, less a share of the prompts, on which it is then
    measured.
    """
    config, optimisation = context.config, context.config.train.reward
    made_of = {
        "sft": sft.key,
        "pairs": {stream: tokenised_stream(context, stream).name for stream in config.data.streams},
        "optimisation": optimisation.model_dump(),
        **context.training_numerics(optimisation.threads),
        "code": code_version(
            "data/batches", "data/draw", "data/pairs", "models", "train", "rewards/classifier",
            "rewards/pairs", "rewards/quality", "rewards/training", "stages/base", "stages/reward",
        ),
    }  # fmt: skip

    def make(folder: Path) -> None:
        pairs = reward_pairs(context)
        counts = {
            f"pairs of {stream}": json.loads((tokenised_stream(context, stream) / COUNTS).read_text())
            for stream in config.data.streams
        }
        card = model_card(config, "reward", counts)
        file = MetricsFile(folder / METRICS)
        with cpu_threads(optimisation.threads):
            steps = _train(context, sft, pairs, folder, file, card)
            wait()  # until the main process has written the weights
            _measure(context, pairs, folder, file, card, steps)
        file.close()

    path = context.store.get("reward_model", made_of, make, together=True, resumable=True)
    context.copy_metrics(path / METRICS)
    return Weights(str(path), path.name, own=True)


def reward_pairs(context: Context) -> RewardPairs:
    """The pairs of all streams, and which of them are held out by a hash of their prompt."""
    tokens, prompts, responses_w, responses_l = [], [], [], []
    for stream in context.config.data.streams:
        part = load_from_disk(str(tokenised_stream(context, stream) / "tokens"))
        records = context.pair_mix(stream).records.select(part["row"][:])
        tokens.append(part)
        prompts += records["prompt"][:]
        responses_w += records["response_w"][:]
        responses_l += records["response_l"][:]
    share = context.config.train.reward.heldout
    heldout = np.array([is_held_out(prompt, share, SPLIT) for prompt in prompts], bool)
    return RewardPairs(TokenisedPairs.of(tokens), prompts, responses_w, responses_l, heldout)


def _train(
    context: Context, sft: Weights, pairs: RewardPairs, folder: Path, file: MetricsFile, card: ModelCard
) -> int:
    """Train and save; returns the number of steps."""
    config, optimisation = context.config, context.config.train.reward
    chat = chat_format(context)
    pad = chat.tokenizer.pad_token_id
    model = new_reward_model(
        sft.path, config.model, own=sft.own, pad_id=pad, seed=optimisation.seed, device=context.device
    )
    select_trained(model, optimisation)
    objective = RewardObjective(pairs.tokens, ~pairs.heldout, optimisation, pad, context.device)

    def on_log(taken: int, values: Mapping[str, float]) -> None:
        require_finite(values, taken, optimisation, "train.reward")
        losses = [value for name, value in values.items() if name.endswith("_loss")]
        context.log_as("reward_model", file, taken, {**values, "loss": sum(losses)})

    run_stage(context, "reward model", model, objective, optimisation, on_log, folder, chat, card)
    return total_steps(optimisation, objective.rows)


def _measure(
    context: Context, pairs: RewardPairs, folder: Path, file: MetricsFile, card: ModelCard, steps: int
) -> None:
    """How the outputs become rewards, and how good they are on the held-out pairs."""
    config = context.config
    raw = Heads.model_validate(
        {name: {"output": name, "centre": 0, "scale": 1, "squash": "none"} for name in REWARDS}
    )
    classifier = load_classifier(str(folder), "reward", config.data.format)
    logits = finite(shared_out(classifier_scorer(classifier, raw)))
    trained, held = np.flatnonzero(~pairs.heldout), np.flatnonzero(pairs.heldout)
    heads = heads_of(pairs.rewards(logits, trained))
    safe = np.stack([pairs.tokens.safe_w, pairs.tokens.safe_l], 1)[held].astype(float)
    quality = measured(pairs.rewards(logits, held), pairs.tokens.ordered[held], safe)
    counts = {"trained_pairs": len(trained), "heldout_pairs": len(held)}
    context.log_as("reward_model", file, steps, {**quality.values, **counts})
    if not group().main:
        return
    (folder / HEADS).write_text(heads.model_dump_json(indent=1))
    (folder / REPORT).write_text(_report(quality, counts))
    title = f"Reward model on {len(held):,} held-out pairs of {config.data.name}"
    quality.plot(folder / PLOT, title)
    scores = {name: 100 * value for name, value in quality.values.items() if name.endswith("_accuracy")}
    (folder / CARD).write_text(card_text(replace(card, scores=scores)), encoding="utf-8")


def _report(quality: Quality, counts: Mapping[str, int]) -> str:
    head = "reward model: {trained_pairs:,} pairs trained, {heldout_pairs:,} held out".format_map(counts)
    return "\n  ".join([head, *quality.lines])


def combination(context: Context, start: Weights) -> Combination:
    """How the run makes one number of the rewards; ``fitted`` becomes the weighted sum that was fitted."""
    rule = context.config.combine
    if not isinstance(rule, Fitted):
        return rule
    return Linear(rule="linear", weights=RewardWeights(**fitted_combination(context, start)))


def fitted_combination(context: Context, start: Weights) -> dict[str, float]:
    """The weights with which the rewards order held-out pairs as wanted, by name; they sum to 1.

    Wanted is the more helpful response in the helpfulness stream, the safer one in the safety stream.
    """
    config, rule = context.config, context.config.combine
    assert isinstance(rule, Fitted)
    made_of = {
        "rewards": scorer_made_of(context, start),
        "pairs": {stream: tokenised_stream(context, stream).name for stream in config.data.streams},
        "heldout": config.train.reward.heldout,
        "rule": rule.model_dump(),
        **context.numerics(),
        "code": code_version("data/draw", "data/pairs", "rewards", "stages/reward"),
    }

    def make(folder: Path) -> None:
        pairs = reward_pairs(context)
        signs = order_signs(pairs.tokens, "stream")
        rows = np.flatnonzero(pairs.heldout & (signs != 0))
        if not len(rows):
            raise UserError(
                "combine=fitted has no held-out pairs to fit its weights on; give train.reward.heldout a "
                "larger share"
            )
        rewards = pairs.rewards(shared_out(scorer(context, start)), rows)
        ahead = np.stack([(rewards[name][:, 0] - rewards[name][:, 1]) * signs[rows] for name in REWARDS], 1)
        weights = fitted_weights(torch.from_numpy(ahead), rule.margin, rule.penalty)
        if group().main:
            (folder / WEIGHTS).write_text(json.dumps(dict(zip(REWARDS, weights.tolist(), strict=True))))

    return json.loads((context.store.get("combination", made_of, make, together=True) / WEIGHTS).read_text())
