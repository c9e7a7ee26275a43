"""The first stages: a tokenizer, a base model, a supervised fine-tuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bfpo_exp import world
from bfpo_exp.config.schema import SeededOptimisation
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.records import Message
from bfpo_exp.data.tokenise import tokenise_demos
from bfpo_exp.hashing import code_version
from bfpo_exp.models.policy import load_policy, random_policy, select_trainable, weights_fingerprint
from bfpo_exp.models.tokenizers import bpe_tokenizer, load_tokenizer, word_tokenizer
from bfpo_exp.progress import progress
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.stages.context import Context, Weights, demo_mix
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train.demonstrations import DemonstrationObjective
from bfpo_exp.train.engine import PlainEngine
from bfpo_exp.train.loop import total_steps, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METRICS = "metrics.jsonl"
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
        "model": config.model.model_dump(exclude={"name", "pretraining"}),
        "tokenizer": tokenizer(context).key,
        "code": code_version("models", "stages/base"),
    }
    if pretraining:
        made_of |= context.numerics(config.train.base.threads) | {
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
        if pretraining:
            corpus = world.corpus(
                pretraining.samples, pretraining.harmful, pretraining.recognition, pretraining.seed
            )
            prompts = [[Message(role="user", content=prompt)] for prompt, _ in corpus]
            tokens = chat.encode_batch(prompts, [[response] for _, response in corpus])
            _train_on_demonstrations(
                context,
                "base",
                model,
                [only.prompt_ids for (only,) in tokens],
                [only.response_ids for (only,) in tokens],
                config.train.base,
                folder,
            )
        save(model, chat, folder)

    path = context.store.get("base", made_of, make)
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
        **context.numerics(config.train.sft.threads),
        "code": code_version("data", "models", "train", "logprobs", "stages/base"),
    }

    def make(folder: Path) -> None:
        chat = chat_format(context)
        tokens, counts = tokenise_demos(demos.records, chat)
        (folder / COUNTS).write_text(json.dumps(counts))
        model = load_policy(base.path, config.model, own=base.own, device=context.device)
        _train_on_demonstrations(
            context,
            "sft",
            model,
            tokens["prompt_ids"][:],
            tokens["response_ids"][:],
            config.train.sft,
            folder,
        )
        save(model, chat, folder)

    path = context.store.get("sft", made_of, make)
    context.copy_metrics(path / METRICS)
    return Weights(str(path), path.name, own=True)


def _train_on_demonstrations(
    context: Context,
    stage: str,
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    optimisation: SeededOptimisation,
    folder: Path,
) -> None:
    """Train in place; the stage's metrics are kept beside its weights."""
    objective = DemonstrationObjective(prompt_ids, response_ids, optimisation, context.device)
    steps = total_steps(optimisation, objective.rows)
    engine = PlainEngine(model, select_trainable(model, optimisation.trainable), optimisation, steps)
    file = MetricsFile(folder / METRICS)
    with cpu_threads(optimisation.threads), progress(stage, steps) as advance:
        train(
            engine,
            objective,
            steps,
            optimisation.log_every,
            lambda step, values: context.log_as(stage, file, step, values),
            advance,
        )
    file.close()


def save(model: PreTrainedModel, chat: ChatFormat, folder: Path) -> None:
    """A Hugging Face folder: safetensors, config, tokenizer with its chat template."""
    chat.tokenizer.chat_template = chat.template
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
