"""The time of a run, from a few steps on random tokens: for models that are small enough to try."""

from __future__ import annotations

import time

import torch

from bfpo_exp.config.schema import Config, Model
from bfpo_exp.config.training import SeededOptimisation
from bfpo_exp.logprobs.paths import PADDED, LogpsPath, Rows, chosen_path
from bfpo_exp.models.policy import random_weights, select_trainable
from bfpo_exp.plan.parameters import Shape
from bfpo_exp.plan.stages import StagePlan
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.train.engine import PlainEngine

MOST_PARAMETERS = 20_000_000  # beyond which a plan would not be had in seconds
PASSES = 3  # timed, after one to warm up


def why_not_timed(config: Model, shape: Shape) -> str | None:
    """Why a model is not tried; None if it is."""
    if config.path is not None:
        return "its weights are not loaded for a plan"
    if shape.parameters > MOST_PARAMETERS:
        return f"it has over {MOST_PARAMETERS:,} parameters"
    return None


def seconds_a_step(config: Config, shape: Shape, stage: StagePlan) -> float:
    """Seconds of an optimisation step on this machine, every sequence as long as it may be.

    The least of a few forward and backward passes of one micro-batch in plain PyTorch, times the
    passes of a step in one process.
    """
    settings = stage.optimisation
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_weights(config.model, device, vocab_size=shape.vocabulary)
    engine = PlainEngine(model, select_trainable(model, settings.trainable), settings, 1)
    path = PADDED if stage.loss is None else chosen_path(config.model, stage.length)
    rows = _random_rows(stage, path, shape.vocabulary, device)
    seconds = []
    with cpu_threads(settings.threads if isinstance(settings, SeededOptimisation) else config.threads):
        for _ in range(1 + PASSES):
            started = time.perf_counter()
            logps, _counts = path.logps(model, rows)
            engine.backward(-logps.mean())
            engine.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) * stage.accumulation


def _random_rows(stage: StagePlan, path: LogpsPath, vocabulary: int, device: torch.device) -> Rows:
    """A micro-batch of full length, half of each sequence a response."""
    generator = torch.Generator().manual_seed(0)
    half = stage.length // 2

    def ids(*shape: int) -> list:
        return torch.randint(vocabulary, shape, generator=generator).tolist()

    prompts = ids(stage.microbatch, half)
    return path.rows(prompts, ids(stage.microbatch, stage.sequences, stage.length - half), device)
