"""One run: a folder named by what determines it, filled by the stages, shown in MLflow."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from filelock import FileLock

from bfpo_exp.compare.curves import training_curves
from bfpo_exp.config.schema import Config
from bfpo_exp.data.card import card_metrics, dataset_card
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version, stable_hash
from bfpo_exp.paths import home
from bfpo_exp.runtime import before_compute
from bfpo_exp.stages.base import base_model, sft_model
from bfpo_exp.stages.context import Context, demo_mix, training_mix
from bfpo_exp.stages.evaluate import evaluate
from bfpo_exp.stages.preference import policy, tokenised_stream
from bfpo_exp.store import Store
from bfpo_exp.tracking.environment import environment_tags
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.tracking.recorder import Recorder, failed, publish_copy
from bfpo_exp.tracking.tables import write_table

log = logging.getLogger(__name__)

COMPUTES = ("config", "data", "eval", "logprobs", "losses", "models", "stages", "train", "world", "run")


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Literal["finished", "reused", "failed"]
    metrics: Mapping[str, float]  # the last value of each
    run_dir: Path
    seconds: float
    reason: str = ""  # of a failure, in one line

    def __str__(self) -> str:
        if self.status == "failed":
            return f"failed: {self.reason}"
        names = ("helpfulness", "disc", "gen", "over_refusal")
        scores = [f"{n} {self.metrics[f'eval/{n}']:.1f}" for n in names if f"eval/{n}" in self.metrics]
        return ", ".join([*scores, "reused" if self.status == "reused" else f"{self.seconds:.0f} s"])


def run_key(config: Config) -> str:
    """The hash of everything that determines a run's numbers; where it is recorded does not."""
    return stable_hash([config.model_dump(exclude={"tracking"}), code_version(*COMPUTES)])


def run(config: Config, uri: str, parent_id: str | None = None) -> Outcome:
    """Do a run, or reuse it if it is done.  What goes wrong is recorded and returned, not raised."""
    started = time.perf_counter()
    before_compute(config.threads)
    run_dir = home() / "run" / run_key(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    name = f"{config.label}-s{config.seed}-{run_dir.name[:6]}"
    with FileLock(run_dir / ".lock"):
        metrics = MetricsFile(run_dir / "metrics.jsonl")
        if _status(run_dir) == "finished":
            publish_copy(uri, config.tracking.experiment, run_dir, name, parent_id)
            return Outcome("reused", metrics.last(), run_dir, time.perf_counter() - started)
        _write(run_dir / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        _write(run_dir / "tags.json", json.dumps(_tags(config), indent=1))
        recorder = Recorder(uri, config.tracking.experiment, run_dir, name, parent_id)
        recorder.open()
        try:
            _execute(Context(config, Store(home() / "store"), metrics), run_dir, recorder)
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())
            (run_dir / "artifacts").mkdir(exist_ok=True)
            (run_dir / "artifacts" / "traceback.txt").write_text(traceback.format_exc())
            _write(run_dir / "status.json", json.dumps({"status": "failed", "reason": reason}))
            recorder.finish("FAILED", failed(reason))
            return Outcome("failed", metrics.last(), run_dir, time.perf_counter() - started, reason)
        finally:
            metrics.close()
        _write(run_dir / "status.json", json.dumps({"status": "finished"}))
        recorder.finish("FINISHED")
    return Outcome("finished", metrics.last(), run_dir, time.perf_counter() - started)


def _execute(context: Context, run_dir: Path, recorder: Recorder) -> None:
    """The way from data to scores."""
    config = context.config
    artifacts = run_dir / "artifacts"
    artifacts.mkdir(exist_ok=True)
    (artifacts / "traceback.txt").unlink(missing_ok=True)  # of an earlier try
    _write(artifacts / "config.yaml", (run_dir / "config.yaml").read_text())

    weights = base_model(context)
    if "sft" in config.stages:
        weights = sft_model(context, weights)
    if "preference" in config.stages:
        _describe_data(context, artifacts)
        recorder.sync()
        weights = policy(context, weights)
    recorder.sync()
    if "evaluate" in config.stages:
        scores, responses = evaluate(context, weights)
        context.metrics.append(0, scores)
        if responses:
            write_table(artifacts / "generations.json", responses)
    context.metrics.close()
    training_curves(context.metrics, artifacts / "training.png", f"{config.label}, seed {config.seed}")


def _describe_data(context: Context, artifacts: Path) -> None:
    """The data set's card, and its counts as metrics."""
    data = context.config.data
    pairs = training_mix(data)
    demos = demo_mix(data) if "sft" in context.config.stages else None
    tokens = {
        f"pairs, {stream}": json.loads((tokenised_stream(context, stream) / "counts.json").read_text())
        for stream in data.streams
    }
    (artifacts / "dataset_card.md").write_text(dataset_card(data, pairs, demos, tokens))
    context.metrics.append(0, card_metrics(pairs, demos, tokens))


def _tags(config: Config) -> dict[str, str]:
    tags = {"config_hash": run_key(config), **environment_tags()}
    if "preference" in config.stages:
        tags["pair_order"] = config.loss.order
        tags["data_fingerprint"] = training_mix(config.data).fingerprint
    return tags


def _status(run_dir: Path) -> str | None:
    file = run_dir / "status.json"
    return json.loads(file.read_text())["status"] if file.exists() else None


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    os.replace(draft, path)
