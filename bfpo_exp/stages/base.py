"""The first stages: a tokenizer, a base model, a supervised fine-tuned model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bfpo_exp import world
from bfpo_exp.config.training import Optimisation, Train
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.conversations import sft_format
from bfpo_exp.data.records import Message
from bfpo_exp.data.tokenise import tokenise_demos
from bfpo_exp.distributed import group
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version
from bfpo_exp.models.lora import merged
from bfpo_exp.models.output import ModelCard, model_card, write_model_folder
from bfpo_exp.models.policy import load_policy, random_policy, select_trainable, weights_fingerprint
from bfpo_exp.models.tokenizers import bpe_tokenizer, load_tokenizer, word_tokenizer
from bfpo_exp.progress import progress
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.stages.context import Context, Weights, demo_mix
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train.checkpoints import Checkpoints
from bfpo_exp.train.demonstrations import DemonstrationObjective
from bfpo_exp.train.engines import make_engine
from bfpo_exp.train.loop import Objective, total_steps, train
from bfpo_exp.train.prepare import prepare_for_training

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
COUNTS = "counts.json"  # of what tokenisation kept, dropped and cut


def tokenizer(context: Context) -> Weights:
    """The tokenizer: the pretrained model's, or one made of the world's words or the data's texts."""
    model = context.config.model
    if model.path is not None:
        return Weights(model.path, weights_fingerprint(model), own=False)
    made_of: dict[str, Any] = {
        "tokenizer": model.tokenizer.model_dump(),
        "code": code_version("models/tokenizers", "world"),
    }
    if model.tokenizer.kind == "bpe":
        made_of["texts"] = demo_mix(context.config.data).fingerprint

    def make(folder: Path) -> None:
        if model.tokenizer.kind == "bpe":
            assert model.tokenizer.vocab_size is not None
            bpe_tokenizer(_texts(context), model.tokenizer.vocab_size).save_pretrained(folder)
        else:
            word_tokenizer(world.vocabulary()).save_pretrained(folder)

    path = context.store.get("tokenizer", made_of, make)
    return Weights(str(path), path.name, own=True)


def _texts(context: Context) -> list[str]:
    records = demo_mix(context.config.data).records
    return [text for r in records for text in (*(m["content"] for m in r["prompt"]), r["response"])]


def chat_format(context: Context) -> ChatFormat:
    """The run's chat format on the run's tokenizer."""
    where, model = tokenizer(context), context.config.model
    loaded = load_tokenizer(
        where.path,
        revision=None if where.own else model.revision,
        trust_remote_code=False if where.own else model.trust_remote_code,
    )
    return ChatFormat(loaded, context.config.data.format)


def base_model(context: Context) -> Weights:
    """Pretrained weights as they are; else random ones, trained on the model's corpus if it has one."""
    config = context.config
    if config.model.path is not None:
        return Weights(config.model.path, weights_fingerprint(config.model), own=False)
    pretraining = config.model.pretraining if "base" in config.stages else None
    made_of: dict[str, Any] = {
        "model": config.model.model_dump(exclude={"name", "pretraining", "attention"}),
        "tokenizer": tokenizer(context).key,
        "code": code_version("models", "stages/base"),
    }
    if pretraining:
        made_of |= context.training_numerics(config.train.base.threads) | {
            "pretraining": pretraining.model_dump(),
            "optimisation": config.train.base.model_dump(),
            "format": config.data.format.model_dump(),
            "code": code_version(
                "models", "world", "data/chat", "data/batches", "train", "logprobs", "stages/base"
            ),
        }

    def make(folder: Path) -> None:
        chat = chat_format(context)
        model = random_policy(config.model, chat.tokenizer, context.device)
        card = model_card(config, "base")
        if not pretraining:
            write_model_folder(model, chat, folder, card)
            return
        corpus = world.corpus(
            pretraining.samples, pretraining.harmful, pretraining.recognition, pretraining.seed
        )
        prompts = [[Message(role="user", content=prompt)] for prompt, _ in corpus]
        tokens = chat.encode_batch(prompts, [[response] for _, response in corpus])
        objective = DemonstrationObjective(
            [only.prompt_ids for (only,) in tokens],
            [only.response_ids for (only,) in tokens],
            config.train.base,
            context.device,
        )
        _train_on_demonstrations(context, "base", model, objective, folder, chat, card)

    path = context.store.get("base", made_of, make, together=bool(pretraining), resumable=bool(pretraining))
    context.copy_metrics(path / METRICS)
    return Weights(str(path), path.name, own=True)


def sft_model(context: Context, base: Weights) -> Weights:
    """The base model, fine-tuned on the mix's demonstrations."""
    config = context.config
    demos = demo_mix(config.data)
    made_of = {
        "base": base.key,
        "demonstrations": demos.fingerprint,
        "format": config.data.format.model_dump(),
        "optimisation": config.train.sft.model_dump(),
        **context.training_numerics(config.train.sft.threads),
        "code": code_version("data", "models", "train", "logprobs", "stages/base"),
    }

    def make(folder: Path) -> None:
        sft, chat = config.train.sft, chat_format(context)
        limits = sft_format(config.data.format, sft.max_length)
        tokens, counts = tokenise_demos(demos.records, ChatFormat(chat.tokenizer, limits), sft.loss_on)
        if group().main:
            (folder / COUNTS).write_text(json.dumps(counts))
        objective = DemonstrationObjective(
            tokens["prompt_ids"],
            tokens["response_ids"],
            sft,
            context.device,
            trained=tokens["trained"],
            row_length=limits.max_length if sft.packing else None,
        )
        model = load_policy(base.path, config.model, own=base.own, device=context.device)
        card = model_card(config, "sft", {"demonstrations": counts})
        _train_on_demonstrations(context, "sft", model, objective, folder, chat, card)

    path = context.store.get("sft", made_of, make, together=True, resumable=True)
    context.copy_metrics(path / METRICS)
    return Weights(str(path), path.name, own=True)


def _train_on_demonstrations(
    context: Context,
    stage: Literal["base", "sft"],
    model: PreTrainedModel,
    objective: DemonstrationObjective,
    folder: Path,
    chat: ChatFormat,
    card: ModelCard,
) -> None:
    """Train and save; the stage's metrics are kept beside its weights."""
    file = MetricsFile(folder / METRICS)

    def on_log(taken: int, values: Mapping[str, float]) -> None:
        require_finite(values, taken, objective.optimisation, f"train.{stage}")
        context.log_as(stage, file, taken, values)

    optimisation = objective.optimisation
    select_trainable(model, optimisation.trainable)
    with cpu_threads(optimisation.threads):
        run_stage(context, stage, model, objective, optimisation, on_log, folder, chat, card)
    file.close()


def require_finite(
    values: Mapping[str, float], taken: int, optimisation: Optimisation, settings: str
) -> None:
    """A `UserError` if training has run away; ``settings`` is where the config has this optimisation."""
    for name, value in values.items():
        if (name == "loss" or name.endswith("_loss")) and not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {taken}: lower {settings}.lr ({optimisation.lr}) or set "
                f"{settings}.clip"
            )


def run_stage(
    context: Context,
    what: str,
    model: Any,
    objective: Objective,
    optimisation: Optimisation,
    on_log: Callable[[int, Mapping[str, float]], None],
    folder: Path,
    chat: ChatFormat,
    card: ModelCard,
    own_weights: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda model, weights: weights,
) -> None:
    """Train what is to be trained of the model, from the stage's latest checkpoint on; save it whole.

    ``model`` is transformers', or peft's around one.  ``own_weights`` leaves out of its weights, and takes
    off the model, what is no part of it.
    """
    steps = total_steps(optimisation, objective.rows)
    prepare_for_training(model, optimisation)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = make_engine(context.config.deepspeed, model, trained, optimisation, steps)
    checkpoints = Checkpoints(
        folder / CHECKPOINTS, optimisation.checkpoint_every, optimisation.keep_checkpoints, folder.name
    )
    with progress(what, steps) as advance:
        train(engine, objective, steps, optimisation.log_every, on_log, advance, checkpoints)
    weights = engine.weights()
    engine.close()
    if weights is not None:
        weights = own_weights(model, weights)
        if isinstance(optimisation, Train) and optimisation.lora:
            weights, model = merged(weights, optimisation.lora), model.unload()
        write_model_folder(model, chat, folder, card, state_dict=weights)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # the result is there
