"""The preference stage of ``loss=steerlm``: responses with the levels of their rewards in the prompt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from bfpo_exp.config.schema import Config
from bfpo_exp.config.training import SeededOptimisation
from bfpo_exp.data.arrow import DEMO_FEATURES
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.clean import KEEP, demo_reasons
from bfpo_exp.data.records import Prompt
from bfpo_exp.data.tokenise import tokenise_demos
from bfpo_exp.distributed import group
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version
from bfpo_exp.models.added_tokens import add_words, extend_embeddings, train_new_rows
from bfpo_exp.models.output import ModelCard, model_card
from bfpo_exp.rewards.scorer import REWARDS, shared_out
from bfpo_exp.stages.base import COUNTS, METRICS, chat_format, require_finite, run_stage
from bfpo_exp.stages.context import Context, Weights
from bfpo_exp.stages.preference import trained_model
from bfpo_exp.stages.reward import scorer, scorer_made_of
from bfpo_exp.steer import SteerLM, attribute_text, quantised, steered, unspelled
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train.demonstrations import DemonstrationObjective
from bfpo_exp.train.meter import Meter

SCORES = "rewards.npz"  # float64, one array for each reward


def settings(config: Config) -> SteerLM:
    """The loss's hyper-parameters."""
    return SteerLM.model_validate(config.loss.hyperparameters)


def steering(context: Context) -> tuple[ChatFormat, list[str]]:
    """The run's chat format, whose tokenizer knows the words of the attributes, and those that it lacked."""
    chat = chat_format(context)
    words = unspelled(chat.tokenizer, settings(context.config))
    if words:
        add_words(chat.tokenizer, words)
    return ChatFormat(chat.tokenizer, chat.format), words


def asked(config: Config, prompt: Prompt) -> Prompt:
    """A prompt that asks for what the run steers towards."""
    loss = settings(config)
    return steered(prompt, attribute_text(loss, loss.steer.model_dump()))


def policy(context: Context, start: Weights) -> Weights:
    """``start``, fine-tuned on the pairs' responses, each after a prompt with the levels of its rewards."""
    config, loss = context.config, settings(context.config)
    responses = pair_responses(context)
    rewards = _rewards(context, start, responses)
    levels = {
        name: quantised(values, loss.levels) for name, values in dict(np.load(rewards / SCORES)).items()
    }
    _check_steer(loss, levels)
    made_of = {
        "start": start.key,
        "responses": rewards.name,
        "format": config.data.format.model_dump(),
        "loss": config.loss.model_dump(exclude={"first", "steer"}),
        "optimisation": config.train.model_dump(exclude={"base", "sft", "reward"}),
        "seed": config.seed,
        **context.training_numerics(),
        "code": code_version("data", "logprobs", "models", "steer", "train", "stages/steerlm"),
    }

    def make(folder: Path) -> None:
        chat, words = steering(context)
        told = _told(responses, levels, loss)
        tokens, counts = tokenise_demos(told, chat)
        model: Any = trained_model(context, start)
        if words:
            first = min(chat.tokenizer.convert_tokens_to_ids(words))
            extend_embeddings(model, first, len(chat.tokenizer), config.seed)
            train_new_rows(model, first)
        objective = SteeredObjective(tokens["prompt_ids"], tokens["response_ids"], config, context.device)
        if group().main:
            (folder / COUNTS).write_text(json.dumps(counts))
        _train(context, model, objective, folder, chat, _card(config, counts))

    path = context.store.get("policy", made_of, make, together=True, resumable=True)
    context.copy_metrics(path / METRICS)
    return Weights(str(path), path.name, own=True)


class SteeredObjective(DemonstrationObjective):
    """Cross-entropy of responses, as many sequences a step as a loss on pairs has: two for each pair."""

    def __init__(self, prompt_ids: Any, response_ids: Any, config: Config, device: Any) -> None:
        settings = twice(config).model_dump(include=set(SeededOptimisation.model_fields))
        optimisation = SeededOptimisation(**settings, seed=config.seed, threads=config.threads)
        super().__init__(prompt_ids, response_ids, optimisation, device)
        self.lengths = [len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True)]

    @property
    def pairs_per_step(self) -> float:
        """Half of the step's sequences."""
        return self.optimisation.batch / 2

    def tokens(self, step: int) -> int:
        """Tokens of a step's prompts and responses."""
        return sum(self.lengths[i] for i in self.batches[step])


def twice(config: Config) -> Any:
    """The preference stage's settings with sequences in place of pairs."""
    train = config.train
    return train.model_copy(update={"batch": 2 * train.batch, "microbatch": 2 * train.microbatch})


def pair_responses(context: Context) -> Dataset:
    """Every response of the pairs that are trained on, once: `arrow.DEMO_FEATURES`."""
    parts = []
    for stream in context.config.trained_streams:
        records = context.pair_mix(stream).records
        for response in ("response_w", "response_l"):
            columns = records.select_columns(["prompt", response, "source", "row"])
            parts.append(columns.rename_column(response, "response").cast(DEMO_FEATURES))
    every = concatenate_datasets(parts)
    return every.select(np.flatnonzero(demo_reasons(every) == KEEP))


def _rewards(context: Context, start: Weights, responses: Dataset) -> Path:
    """The rewards of these responses, in their order."""
    streams = context.config.trained_streams
    made_of = {
        "pairs": [context.pair_mix(stream).fingerprint for stream in streams],
        "rewards": scorer_made_of(context, start),
        **context.numerics(),
        "code": code_version("data/clean", "stages/steerlm"),
    }

    def make(folder: Path) -> None:
        found = shared_out(scorer(context, start))(responses["prompt"][:], responses["response"][:])
        if group().main:
            np.savez(folder / SCORES, **{name: found[name] for name in REWARDS})  # type: ignore[arg-type]

    return context.store.get("rewards", made_of, make, together=True)


def _check_steer(loss: SteerLM, levels: Mapping[str, np.ndarray]) -> None:
    """A level that no response has is one that the policy never sees."""
    for name, level in loss.steer:
        known = sorted(set(levels[name].tolist()))
        if level not in known:
            raise UserError(
                f"loss.steer.{name}={level}, but no response of the training pairs has that level (they have "
                f"{', '.join(map(str, known))}); steer to one of these, or lower loss.levels={loss.levels}"
            )


def _told(responses: Dataset, levels: Mapping[str, np.ndarray], loss: SteerLM) -> Dataset:
    """The responses after prompts that tell their levels."""
    columns = responses.to_dict()
    columns["prompt"] = [
        steered(prompt, attribute_text(loss, {name: int(of[i]) for name, of in levels.items()}))
        for i, prompt in enumerate(columns["prompt"])
    ]
    return Dataset.from_dict(columns, features=DEMO_FEATURES)


def _card(config: Config, counts: dict[str, int]) -> ModelCard:
    card, loss = model_card(config, "preference", {"steered responses": counts}), settings(config)
    best = attribute_text(loss, dict.fromkeys(REWARDS, loss.levels - 1))
    how = f"It was trained on prompts that end with what the response is; {best!r} asks for the best."
    return dataclasses.replace(card, summary=f"{card.summary} {how}")


def _train(
    context: Context, model: Any, objective: SteeredObjective, folder: Path, chat: ChatFormat, card: ModelCard
) -> None:
    config = context.config
    file, meter = MetricsFile(folder / METRICS), Meter(objective)

    def on_log(taken: int, values: Mapping[str, float]) -> None:
        require_finite(values, taken, config.train, "train")
        context.log_as("train", file, taken, {**values, **meter.read(taken)})

    what = f"{config.label}, seed {config.seed}"
    run_stage(context, what, model, objective, twice(config), on_log, folder, chat, card)
    file.close()


def check_steerlm(context: Context) -> None:
    """A `UserError` for what attributes in prompts do not go with."""
    config = context.config
    train, loss = config.train, settings(config)
    chat, words = steering(context)
    text = attribute_text(loss, loss.steer.model_dump())
    if chat.spells_control(text):
        raise UserError(f"loss.template={loss.template!r} spells a control token of the tokenizer")
    new = f"the tokenizer of model={config.model.name} lacks the words {', '.join(words)}"
    if words and train.lora is not None:
        raise UserError(f"{new}, whose embeddings no adapter trains; set train.lora=null")
    if words and train.weight_decay and train.trainable != "all":
        raise UserError(
            f"{new}: they get rows among embeddings that train.trainable leaves as they are, and "
            f"train.weight_decay={train.weight_decay} would shrink these; set it to 0"
        )
