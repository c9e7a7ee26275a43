"""How long each stage of the default run takes on this machine, from an empty runs root.

Run it with ``make bench``.  It trains the default model, so it takes a few minutes; nothing else
should use the machine meanwhile.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from bfpo_exp.config.check import checked
from bfpo_exp.paths import config_dir
from bfpo_exp.runtime import before_compute
from bfpo_exp.stages.base import base_model, sft_model
from bfpo_exp.stages.context import Context
from bfpo_exp.stages.evaluate import evaluate
from bfpo_exp.stages.preference import policy, reference_pass
from bfpo_exp.store import Store
from bfpo_exp.tracking.metrics_file import MetricsFile


def main() -> None:
    """Time the stages one after another, then once more with everything in the store."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = checked(compose("config"))
    before_compute(config.threads)
    table = Table(
        "stage", "first time (s)", "again (s)", title=f"{platform.processor() or platform.machine()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BFPO_EXP_HOME"] = folder
        context = Context(config, Store(Path(folder) / "store"), MetricsFile(Path(folder) / "metrics.jsonl"))
        base = timed(lambda: base_model(context))
        sft = timed(lambda: sft_model(context, base.result))
        reference = timed(lambda: reference_pass(context, sft.result))
        trained = timed(lambda: policy(context, sft.result))
        scored = timed(lambda: evaluate(context, trained.result))
        for name, stage in {
            "base": base, "sft": sft, "reference": reference, "preference": trained, "evaluate": scored,
        }.items():  # fmt: skip
            table.add_row(name, f"{stage.first:.1f}", f"{stage.again:.1f}")
        speed = context.metrics.last()["perf/pairs_per_second"]
    Console().print(table)
    print(f"preference stage: {speed:.0f} pairs/s over its last steps, {config.threads} CPU thread(s)")


class timed:
    """An action done twice: its result, and the seconds that each time took."""

    def __init__(self, action: Callable) -> None:
        started = time.perf_counter()
        self.result = action()
        self.first = time.perf_counter() - started
        action()
        self.again = time.perf_counter() - started - self.first


if __name__ == "__main__":
    main()
