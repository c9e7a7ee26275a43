"""The preference stage: tokenised pairs, the reference's log-probs, a policy."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from datasets import load_from_disk

from bfpo_exp.config.types import StreamName
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.data.tokenise import tokenise_pairs
from bfpo_exp.distributed import group
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version
from bfpo_exp.logprobs.paths import LogpsPath, chosen_path
from bfpo_exp.logprobs.reference import PairLogps, reference_logps
from bfpo_exp.losses import LabelOrderWarning, is_staged, pairwise_loss
from bfpo_exp.models.lora import add_lora
from bfpo_exp.models.output import ModelCard, model_card
from bfpo_exp.models.policy import load_policy, select_trainable
from bfpo_exp.progress import progress
from bfpo_exp.stages.base import COUNTS, METRICS, chat_format, require_finite, run_stage, tokenizer
from bfpo_exp.stages.context import Context, Weights
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train.live_reference import live_reference
from bfpo_exp.train.meter import Meter
from bfpo_exp.train.preference import PreferenceObjective
from bfpo_exp.train.prepare import compile_blocks

# How far the first step's loss may lie from its value at policy == reference, relatively, by the
# weights' dtype: the two are computed in batches of another shape, which moves log-probs in their
# last digits (in bfloat16 a sum of them by up to 0.06 nats).
STEP_ZERO_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def tokenised_stream(context: Context, stream: StreamName) -> Path:
    """The tokenised pairs of one stream, with the counts of what tokenisation dropped."""
    mix = context.pair_mix(stream)
    made_of = {
        "pairs": mix.fingerprint,
        "tokenizer": tokenizer(context).key,
        "format": context.config.data.format.model_dump(),
        "code": code_version("data/chat", "data/tokenise"),
    }

    def make(folder: Path) -> None:
        tokens, counts = tokenise_pairs(mix.records, chat_format(context))
        tokens.save_to_disk(str(folder / "tokens"))
        (folder / COUNTS).write_text(json.dumps(counts))

    return context.store.get("pairs", made_of, make)


def reference_of_stream(context: Context, reference: Weights, tokens: Path, stream: StreamName) -> PairLogps:
    """The reference's log-probs of one stream's pairs."""
    model = context.config.model
    made_of = {
        "reference": reference.key,
        "pairs": tokens.name,
        **context.numerics(),
        "forward": _path(context).name,
        "code": code_version("logprobs", "models/policy"),
    }

    def make(folder: Path) -> None:
        pairs = _pairs(tokens)
        policy = load_policy(reference.path, model, own=reference.own, device=context.device)
        with progress(f"reference log-probs, {stream}", len(pairs)) as advance:
            logps = reference_logps(policy, pairs, _path(context), advance, folder)
        if group().main:
            logps.save(folder)

    return PairLogps.load(context.store.get("reference", made_of, make, together=True, resumable=True))


def _path(context: Context) -> LogpsPath:
    """How log-probs are computed: the same way by reference and policy, or their ratio would be off."""
    return chosen_path(context.config.model, context.config.data.format.max_length)


# The runs of a sweep share their pairs; as lists of token ids they take a while to read.
@functools.lru_cache(4)
def _pairs(*folders: Path) -> TokenisedPairs:
    """The tokenised pairs in these folders, one after another."""
    return TokenisedPairs.of([load_from_disk(str(folder / "tokens")) for folder in folders])


def reference_pass(context: Context, reference: Weights) -> PairLogps:
    """The reference's log-probs of the pairs that the loss trains on, one stream after another."""
    return PairLogps.concatenate(
        [
            reference_of_stream(context, reference, tokenised_stream(context, stream), stream)
            for stream in context.config.trained_streams
        ]
    )


def policy(context: Context, start: Weights) -> Weights:
    """``start``, trained on the preference pairs with the run's loss.

    A loss that is no function of pairs is handed over to its own stage.

    A loss with a stage before it (``loss.first``) has that stage's policy trained from ``start``.
    If it takes a margin, that is the first policy's, and the reference is ``start``; else the first
    policy is what this stage starts from, and its reference.
    """
    config = context.config
    if is_staged(config.loss):
        return _own_stage(config.loss.name)(context, start)
    reference, first = start, None
    if config.loss.first is not None:
        first = policy(context.of_first_loss(), start)
        if not pairwise_loss(config.loss.name).needs_margin:
            reference, first = first, None
    streams = [(stream, tokenised_stream(context, stream)) for stream in config.trained_streams]
    made_of = {
        "reference": reference.key,
        "margin": first.key if first else None,
        "pairs": {stream: path.name for stream, path in streams},
        "batches": config.data.batches,
        "loss": config.loss.model_dump(exclude={"first"}),
        "optimisation": config.train.model_dump(exclude={"base", "sft", "reward"}),
        "seed": config.seed,
        "forward": _path(context).name,
        **context.training_numerics(),
        "code": code_version(
            "data/batches", "data/pairs", "logprobs", "losses", "models", "train", "stages/preference"
        ),
    }

    def make(folder: Path) -> None:
        pairs = _pairs(*(path for _, path in streams))
        margin = reference_pass(context, first) if first else None
        held = reference_pass(context, reference) if config.train.reference == "cached" else None
        model = trained_model(context, reference)
        objective = PreferenceObjective(
            pairs, held or live_reference(model, _path(context)), config, context.device, margin
        )
        counts = {f"pairs of {stream}": json.loads((path / COUNTS).read_text()) for stream, path in streams}
        _train(context, model, objective, folder, model_card(config, "preference", counts))

    path = context.store.get("policy", made_of, make, together=True, resumable=True)
    context.copy_metrics(path / METRICS)
    return Weights(str(path), path.name, own=True)


def trained_model(context: Context, start: Weights) -> torch.nn.Module:
    """The model to start from, with what is to be trained of it chosen, or its adapters added."""
    config = context.config
    model: torch.nn.Module = load_policy(start.path, config.model, own=start.own, device=context.device)
    if config.train.lora:
        model = add_lora(model, config.train.lora, config.seed)  # type: ignore[arg-type]
    else:
        select_trainable(model, config.train.trainable)
    if config.train.compile:
        compile_blocks(model)
    return model


def _own_stage(loss: str) -> Callable[[Context, Weights], Weights]:
    """The stage that trains a loss which is no function of pairs."""
    from bfpo_exp.stages import online, steerlm

    return {"morl": online.policy, "steerlm": steerlm.policy}[loss]


def _train(
    context: Context,
    model: torch.nn.Module,
    objective: PreferenceObjective,
    folder: Path,
    card: ModelCard,
) -> None:
    config = context.config
    file = MetricsFile(folder / METRICS)
    meter = Meter(objective)

    def on_log(taken: int, values: Mapping[str, float]) -> None:
        values = dict(values)
        if nonfinite := objective.nonfinite():
            raise UserError(nonfinite)
        require_finite(values, taken, config.train, "train")
        at_reference = values.pop("loss_at_reference")
        if taken == 1:
            _assert_step_zero(values["loss"], at_reference, STEP_ZERO_TOLERANCE[config.model.dtype])
            values.pop("accuracy", None)  # h is zero up to rounding: its sign says nothing yet
        context.log_as("train", file, taken, values | meter.read(taken))

    what = f"{config.label}, seed {config.seed}" + (", first stage" if context.role == "first" else "")
    with warnings.catch_warnings(), objective.path.during(model):
        warnings.simplefilter("ignore", LabelOrderWarning)  # said once, before the run
        chat = chat_format(context)
        run_stage(context, what, model, objective, config.train, on_log, folder, chat, card)
    file.close()


def _assert_step_zero(loss: float, at_reference: float, tolerance: float) -> None:
    """The first step's loss is the loss at policy == reference, or the two were not computed alike."""
    if not math.isclose(loss, at_reference, rel_tol=tolerance, abs_tol=1e-5):
        raise AssertionError(
            f"the loss of the first step is {loss:.6g}, but at policy == reference it is "
            f"{at_reference:.6g}: the reference's log-probs are not those of the model that is trained"
        )
