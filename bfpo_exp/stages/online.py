"""The preference stage of ``loss=morl``: prompts, rewards and the policy's own samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk

from bfpo_exp.config.rewards import Combination, Lagrangian
from bfpo_exp.config.schema import STREAMS
from bfpo_exp.config.types import StreamName
from bfpo_exp.distributed import group
from bfpo_exp.hashing import code_version
from bfpo_exp.logprobs.paths import chosen_path
from bfpo_exp.models.output import model_card
from bfpo_exp.online.controls import adapted, ascended
from bfpo_exp.online.objective import Controls, OnlineObjective
from bfpo_exp.online.rollout import Prompts, Rollout
from bfpo_exp.online.sampler import RolloutSampler, distinct_prompts
from bfpo_exp.online.settings import Morl
from bfpo_exp.online.value import add_value_head, without_value_head
from bfpo_exp.rewards.scorer import shared_out
from bfpo_exp.stages.base import METRICS, chat_format, require_finite, run_stage, tokenizer
from bfpo_exp.stages.context import Context, Weights
from bfpo_exp.stages.preference import trained_model
from bfpo_exp.stages.reward import combination, scorer, scorer_made_of
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train.live_reference import live_reference
from bfpo_exp.train.meter import Meter

SAMPLES = "samples.jsonl"  # every response, its rewards and its divergence from the reference
# Nats per response by which the first samples' divergence may differ from 0, by the weights' dtype.
STEP_ZERO_KL = {"float32": 1e-3, "bfloat16": 0.5}


def policy(context: Context, start: Weights) -> Weights:
    """``start``, trained on its own samples for the combined reward; ``start`` is the reference."""
    config = context.config
    made_of = {
        "reference": start.key,
        "rewards": scorer_made_of(context, start),
        "combine": combination(context, start).model_dump(),
        "prompts": [_prompts_of_stream(context, stream).name for stream in config.trained_streams],
        "batches": config.data.batches,
        "format": config.data.format.model_dump(),
        "loss": config.loss.model_dump(),
        "optimisation": config.train.model_dump(exclude={"base", "sft", "reward"}),
        "sampling_batch": config.eval.sampling.batch,
        "seed": config.seed,
        "forward": chosen_path(config.model, config.data.format.max_length).name,
        **context.training_numerics(),
        "code": code_version(
            "data", "logprobs", "models", "online", "rewards", "train", "stages/online", "stages/reward"
        ),
    }
    path = context.store.get(
        "policy", made_of, lambda folder: _make(context, start, folder), together=True, resumable=True
    )
    context.copy_metrics(path / METRICS)
    return Weights(str(path), path.name, own=True)


def _make(context: Context, start: Weights, folder: Path) -> None:
    config = context.config
    settings = Morl.model_validate(config.loss.hyperparameters)
    chat = chat_format(context)
    path = chosen_path(config.model, config.data.format.max_length)
    prompts = _prompts([_prompts_of_stream(context, stream) for stream in config.trained_streams])
    model: Any = trained_model(context, start)
    reference = live_reference(model, path)
    if settings.advantages == "value":
        add_value_head(model)
    rule = combination(context, start)
    kept = SamplesFile(folder / SAMPLES, prompts)
    sampler = RolloutSampler(
        model, reference, prompts, shared_out(scorer(context, start)), rule, chat, path, config, kept.append
    )
    objective = OnlineObjective(
        prompts,
        reference,
        sampler,
        lambda rollout: steered(rollout, settings, rule),
        rule.multiplier if isinstance(rule, Lagrangian) else None,
        config,
        context.device,
    )
    file, meter = MetricsFile(folder / METRICS), Meter(objective)

    def on_log(taken: int, values: Mapping[str, float]) -> None:
        require_finite(values, taken, config.train, "train")
        if taken == 1 and abs(values["kl"]) > STEP_ZERO_KL[config.model.dtype]:
            raise AssertionError(
                f"the first samples' KL to the reference is {values['kl']:.4g}, but there policy == reference"
            )
        context.log_as("train", file, taken, dict(values) | meter.read(taken))

    what = f"{config.label}, seed {config.seed}"
    with objective.during(model):
        card = model_card(config, "preference")
        run_stage(
            context, what, model, objective, config.train, on_log, folder, chat, card, without_value_head
        )
    file.close()


def steered(rollout: Rollout, settings: Morl, rule: Combination) -> Controls:
    """beta and lambda for the rollout after this one."""
    beta, multiplier = rollout.coefficient, rollout.multiplier
    if settings.kl_target is not None:
        beta = adapted(beta, float(rollout.kl.mean()), settings.kl_target)
    if isinstance(rule, Lagrangian):
        cost = 1 - float(np.mean(rollout.rewards["safety"]))
        multiplier = ascended(multiplier or 0.0, cost, rule.limit, rule.rate)
    return beta, multiplier


class SamplesFile:
    """JSON lines, one of each response; what a killed run wrote and does again is written once."""

    def __init__(self, file: Path, prompts: Prompts) -> None:
        self.file, self.prompts = file, prompts
        self._continued = False

    def append(self, rollout: Rollout, texts: Sequence[str]) -> None:
        """The responses of a rollout, after those of the rollouts before it."""
        if not group().main:
            return
        if not self._continued and self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _before(line, rollout.number)]
            self.file.write_text("".join(f"{line}\n" for line in lines))
        self._continued = True
        k = rollout.samples
        with self.file.open("a") as out:
            for i, (text, kl) in enumerate(zip(texts, rollout.kl.tolist(), strict=True)):
                row = {
                    "rollout": rollout.number,
                    "prompt": self.prompts.messages[rollout.prompts[i // k]][-1]["content"],
                    "response": text,
                    **{name: values[i] for name, values in rollout.rewards.items()},
                    "reward": rollout.reward[i],
                    "kl": kl,
                }
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _before(line: str, number: int) -> bool:
    """Whether a line is whole and of an earlier rollout."""
    try:
        return json.loads(line)["rollout"] < number
    except ValueError:
        return False


def _prompts_of_stream(context: Context, stream: StreamName) -> Path:
    """The distinct prompts of one stream's pairs, with their token ids."""
    mix = context.pair_mix(stream)
    made_of = {
        "pairs": mix.fingerprint,
        "tokenizer": tokenizer(context).key,
        "format": context.config.data.format.model_dump(),
        "code": code_version("data/chat", "online/sampler", "stages/online"),
    }

    def make(folder: Path) -> None:
        chat, messages = chat_format(context), mix.records["prompt"][:]
        ids = [chat.prompt_ids(prompt) for prompt in messages]
        found = distinct_prompts(messages, ids, np.full(len(ids), STREAMS.index(stream), np.int8))
        columns = {"messages": list(found.messages), "ids": list(found.ids), "stream": found.stream}
        Dataset.from_dict(columns).save_to_disk(str(folder / "prompts"))

    return context.store.get("prompts", made_of, make)


def _prompts(folders: Sequence[Path]) -> Prompts:
    parts = [load_from_disk(str(folder / "prompts")) for folder in folders]
    return Prompts(
        messages=[row for part in parts for row in part["messages"][:]],
        ids=[row for part in parts for row in part["ids"][:]],
        stream=np.concatenate([np.array(part["stream"][:], np.int8) for part in parts]),
    )
