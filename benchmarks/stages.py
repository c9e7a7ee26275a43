"""How long each stage of the default run takes on this machine, from an empty runs root."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from bfpo_exp.config.check import checked
from bfpo_exp.paths import config_dir
from bfpo_exp.runtime import before_compute
from bfpo_exp.stages.base import base_model, sft_model
from bfpo_exp.stages.context import Context
from bfpo_exp.stages.evaluate import evaluate
from bfpo_exp.stages.preference import policy, reference_pass
from bfpo_exp.store import Store
from bfpo_exp.tracking.metrics_file import MetricsFile


def measure(settings: list[str]) -> dict[str, Any]:
    """Seconds of the stages of the default run with these settings, and once more with all in the store."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = checked(compose("config", settings))
    before_compute(config.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BFPO_EXP_HOME"] = folder
        context = Context(config, Store(Path(folder) / "store"), MetricsFile(Path(folder) / "metrics.jsonl"))
        base = timed(lambda: base_model(context))
        sft = timed(lambda: sft_model(context, base.result))
        reference = timed(lambda: reference_pass(context, sft.result))
        trained = timed(lambda: policy(context, sft.result))
        scored = timed(lambda: evaluate(context, trained.result))
        speed = context.metrics.last()["perf/pairs_per_second"]
    stages = {
        "base": base, "sft": sft, "reference": reference, "preference": trained, "evaluate": scored,
    }  # fmt: skip
    return {
        "threads": config.threads,
        "pairs_per_second": speed,
        "seconds": {name: {"first": stage.first, "again": stage.again} for name, stage in stages.items()},
    }


class timed:
    """An action done twice: its result, and the seconds that each time took."""

    def __init__(self, action: Callable) -> None:
        started = time.perf_counter()
        self.result = action()
        self.first = time.perf_counter() - started
        action()
        self.again = time.perf_counter() - started - self.first
