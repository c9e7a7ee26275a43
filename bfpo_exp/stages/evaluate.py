"""The last stage: the policy answers, chooses and is scored."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.distributed import group
from bfpo_exp.eval.choose import choose
from bfpo_exp.eval.generate import generate
from bfpo_exp.eval.kinds import KINDS
from bfpo_exp.eval.summary import summarise
from bfpo_exp.eval.tasks import ChoiceTask, GenerationTask, Prompt, Value
from bfpo_exp.hashing import code_version, stable_hash
from bfpo_exp.logprobs.paths import chosen_path
from bfpo_exp.losses import StagedLoss, get_loss
from bfpo_exp.models.policy import load_policy
from bfpo_exp.progress import progress
from bfpo_exp.stages.base import chat_format
from bfpo_exp.stages.context import Context, Weights, heldout_mix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "responses.json"


def evaluate(context: Context, policy: Weights) -> tuple[dict[str, float], dict[str, list[Value]]]:
    """Scores in percent, and the table of judged generations (columns of equal length)."""
    config = context.config.eval
    built = {
        name: KINDS[task.kind](task, config, lambda: list(heldout_mix(context.config.data).records))
        for name, task in config.tasks.items()
    }
    chat, ask = _asking(context)

    @functools.cache
    def model() -> PreTrainedModel:
        return load_policy(policy.path, context.config.model, own=policy.own, device=context.device)

    asking = {name: task for name, task in built.items() if isinstance(task, GenerationTask)}
    prompts = [prompt for task in asking.values() for prompt in task.prompts]
    responses = iter(_responses(context, policy, model, chat, list(map(ask, prompts))) if prompts else ())
    judged = {
        name: [
            {"task": name, "prompt": prompt[-1]["content"], "response": text, **task.judge(i, text)}
            for i, (prompt, text) in enumerate(zip(task.prompts, responses, strict=False))
        ]
        for name, task in asking.items()
    }

    rights = {}
    for name, task in built.items():
        if isinstance(task, ChoiceTask):
            told = replace(task, prompts=list(map(ask, task.prompts)))
            path = chosen_path(context.config.model, context.config.data.format.max_length)
            with progress(name, len(task.prompts)) as advance:
                chosen = choose(model(), chat, told, config.choice_score, path, advance)
            rights[name] = [c == answer for c, answer in zip(chosen, task.answers, strict=True)]

    rows = [row for rows in judged.values() for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = {name: [row.get(name, "") for row in rows] for name in names}
    return summarise(config.tasks, judged, rights), table


def _asking(context: Context) -> tuple[ChatFormat, Callable[[Prompt], Prompt]]:
    """How the policy is asked: its chat format, and a prompt as it is put to it, which no judge sees."""
    config = context.config
    spec = get_loss(config.loss.name)
    if "preference" not in config.stages or not isinstance(spec, StagedLoss) or not spec.steers:
        return chat_format(context), lambda prompt: prompt
    from bfpo_exp.stages.steerlm import asked, steering

    return steering(context)[0], lambda prompt: asked(config, prompt)


def _responses(
    context: Context,
    policy: Weights,
    model: Callable[[], PreTrainedModel],
    chat: ChatFormat,
    prompts: Sequence[Prompt],
) -> list[str]:
    """Responses to the prompts, generated once for these weights, this sampling and this seed."""
    config = context.config
    made_of = {
        "policy": policy.key,
        "prompts": stable_hash(list(prompts)),
        "format": config.data.format.model_dump(),
        "sampling": config.eval.sampling.model_dump(),
        "seed": config.seed,
        **context.numerics(),
        "code": code_version("eval/generate", "models/sampling", "data/chat", "models/policy"),
    }

    def make(folder: Path) -> None:
        with progress("generation", len(prompts)) as advance:
            texts = generate(model(), chat, prompts, config.eval.sampling, config.seed, advance)
        if group().main:
            (folder / FILE).write_text(json.dumps(texts))

    entry = context.store.get("generations", made_of, make, together=True)
    return json.loads((entry / FILE).read_text())
