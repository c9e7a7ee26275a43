"""One run: a folder named by what determines it, filled by the stages, shown in MLflow."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock

from bfpo_exp.compare.curves import training_curves
from bfpo_exp.config.rewards import ClassifierReward
from bfpo_exp.config.schema import Config
from bfpo_exp.config.schema import Stage as PipelineStage
from bfpo_exp.data.demos import demos_fingerprint
from bfpo_exp.data.mix import pairs_fingerprint
from bfpo_exp.distributed import group, join, lost_another, told
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import code_version, stable_hash
from bfpo_exp.heartbeat import Heartbeat
from bfpo_exp.losses import get_loss
from bfpo_exp.models.numerics import resolved_attention
from bfpo_exp.models.policy import weights_fingerprint
from bfpo_exp.named_runs import run_name
from bfpo_exp.paths import home
from bfpo_exp.rewards.classifier import classifier_fingerprint
from bfpo_exp.rewards.use import told as told_rewards
from bfpo_exp.rewards.use import trains_reward_model, unread, uses_rewards
from bfpo_exp.runtime import before_compute
from bfpo_exp.stages.bandit import bandit
from bfpo_exp.stages.context import Context, device, training_mix
from bfpo_exp.stages.pipeline import REPORT, pipeline
from bfpo_exp.stages.soup import soup_made_of, soup_text
from bfpo_exp.store import Store
from bfpo_exp.tracking.environment import environment_tags
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.tracking.recorder import Recorder, failed, publish_copy
from bfpo_exp.tracking.runs import REWARDS
from bfpo_exp.tracking.sync_later import LATER, Later

SYNC_SECONDS = 5.0  # between two sendings of a run's metrics while it trains
COMPUTES = (
    "bandit", "config", "data", "eval", "logprobs", "losses", "models", "online", "rewards", "stages",
    "steer", "theory", "train", "world", "run",
)  # fmt: skip
OTHER_FAILURE = "failure.txt"  # of a process other than the main one
VANISHED = "another process of the run has vanished"  # and left no word; the reason begins so
TRACEBACK = "traceback.txt"  # of a failure


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: Literal["finished", "reused", "failed"]
    metrics: Mapping[str, float]  # the last value of each
    run_dir: Path
    seconds: float
    reason: str = ""  # of a failure, in one line

    @property
    def report(self) -> str:
        """What the run has to say beyond its scores; empty if nothing."""
        file = self.run_dir / "artifacts" / REPORT
        return file.read_text() if self.status != "failed" and file.exists() else ""

    def __str__(self) -> str:
        if self.status == "failed":
            return f"failed: {self.reason}"
        names = ("helpfulness", "disc", "gen", "over_refusal")
        scores = [f"{n} {self.metrics[f'eval/{n}']:.1f}" for n in names if f"eval/{n}" in self.metrics]
        return ", ".join([*scores, "reused" if self.status == "reused" else f"{self.seconds:.0f} s"])


def run_key(config: Config) -> str:
    """The hash of everything that determines a run's numbers; where it is recorded does not.

    Files count by their content, so a run on rows that have changed since is another run.  Settings of
    rewards count where the run reads them.
    """
    reward = config.reward
    inputs = {
        "pairs": pairs_fingerprint(config.data) if _reads_pairs(config) else None,
        "demonstrations": demos_fingerprint(config.data) if "sft" in config.stages else None,
        "weights": weights_fingerprint(config.model) if config.model.path else None,
        "classifier": classifier_fingerprint(reward.model)
        if uses_rewards(config) and isinstance(reward, ClassifierReward)
        else None,
        "device": device().type,
        "attention": resolved_attention(config.model),
    }
    values = config.model_dump(exclude={"tracking": True, **unread(config)})
    if "soup" in config.stages:
        values["soup"] = soup_made_of(config)  # whatever its runs are called
    return stable_hash([values, inputs, run_code()])


def run_code() -> str:
    """The version of all code that a run's numbers depend on."""
    return code_version(*COMPUTES)


def _reads_pairs(config: Config) -> bool:
    asks_held_out = "evaluate" in config.stages and config.data.heldout > 0
    trains = bool({"reference", "preference"} & set(config.stages)) or trains_reward_model(config)
    return asks_held_out or trains


def run(config: Config, uri: str | None, parent_id: str | None = None, *, wait: bool = True) -> Outcome:
    """Do a run, or reuse it if it is done.  What goes wrong is recorded and returned, not raised.

    Without a ``uri`` nothing is sent to MLflow; `bfpo_exp.tracking.sync` does so later.

    Where another process does the same run, this one waits for it, or without ``wait`` raises
    `filelock.Timeout`.
    """
    started = time.perf_counter()
    before_compute(config.threads)
    join()
    if not group().main:
        return _follow(config)
    run_dir, recorder = _opened(config, uri, parent_id)
    with FileLock(run_dir / ".lock", timeout=-1 if wait else 0), Heartbeat(run_dir) as beat:
        metrics = _Followed(run_dir / "metrics.jsonl", config, beat)
        finished = told(_status(run_dir) == "finished")
        if finished:
            if uri is not None:
                publish_copy(uri, config.tracking.experiment, run_dir, recorder.name, parent_id)
            return Outcome("reused", metrics.last(), run_dir, time.perf_counter() - started)
        _write(run_dir / "config.yaml", yaml.safe_dump(_shown(config), sort_keys=False))
        (run_dir / OTHER_FAILURE).unlink(missing_ok=True)  # of an earlier try
        try:
            _write(run_dir / "tags.json", json.dumps(_tags(config), indent=1))
            recorder.open()
            live = at_most_every(SYNC_SECONDS, recorder.sync)
            _execute(Context(config, Store(home() / "store"), metrics, live), run_dir, beat.enter)
        except KeyboardInterrupt:
            reason = _record_failure(run_dir, recorder, _other_failure(run_dir) or "interrupted")
            if reason == "interrupted":
                raise
            return Outcome("failed", metrics.last(), run_dir, time.perf_counter() - started, reason)
        except Exception as error:
            reason = _reason(error)
            # A process that fails breaks the others' connections to it: its own word comes first.
            reason = _record_failure(run_dir, recorder, _other_failure(run_dir) or reason)
            return Outcome("failed", metrics.last(), run_dir, time.perf_counter() - started, reason)
        finally:
            metrics.close()
        _write(run_dir / "status.json", json.dumps({"status": "finished"}))
        recorder.finish("FINISHED")
    return Outcome("finished", metrics.last(), run_dir, time.perf_counter() - started)


def _follow(config: Config) -> Outcome:
    """The part of a process that is not the main one: the same stages, and no word of them."""
    started = time.perf_counter()
    run_dir = home() / "run" / run_key(config)
    if told(False):
        return Outcome("reused", {}, run_dir, time.perf_counter() - started)
    try:
        pipeline(Context(config, Store(home() / "store"), MetricsFile(os.devnull)), None)
    except Exception as error:
        reason = _reason(error)
        traceback.print_exc()
        if not reason.startswith(VANISHED):
            _write(run_dir / OTHER_FAILURE, f"process {group().rank}: {' '.join(reason.split())}")
        return Outcome("failed", {}, run_dir, time.perf_counter() - started, reason)
    return Outcome("finished", {}, run_dir, time.perf_counter() - started)


def _reason(error: Exception) -> str:
    """Why a run failed, in words."""
    if isinstance(error, UserError):
        return str(error)
    words = f"{type(error).__name__}: {error}"
    return f"{VANISHED} ({words})" if lost_another(error) else words


class _Followed(MetricsFile):
    """The run's metrics file, which tells the heartbeat what step it has come to."""

    def __init__(self, path: Path, config: Config, beat: Heartbeat) -> None:
        super().__init__(path)
        train = config.train
        self._beat = beat
        self._totals = {
            "base": train.base.steps, "sft": train.sft.steps, "reward_model": train.reward.steps,
            "train": train.steps, "first": train.steps,
        }  # fmt: skip

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        super().append(step, metrics)
        for stage in {name.partition("/")[0] for name in metrics} & set(self._totals):
            self._beat.at(step, self._totals[stage], metrics.get("perf/pairs_per_second"))


def _other_failure(run_dir: Path) -> str | None:
    """What another process of the run died of; the launcher then ends the main one with a signal."""
    file = run_dir / OTHER_FAILURE
    return file.read_text() if group().size > 1 and file.exists() else None


def give_up(config: Config, uri: str | None, parent_id: str | None, reason: str) -> Outcome:
    """Record as failed a run whose process died and could not say so itself."""
    run_dir, recorder = _opened(config, uri, parent_id)
    _write(run_dir / "config.yaml", yaml.safe_dump(_shown(config), sort_keys=False))
    _record_failure(run_dir, recorder, reason)
    return Outcome("failed", {}, run_dir, 0.0, reason)


def _opened(config: Config, uri: str | None, parent_id: str | None) -> tuple[Path, Recorder]:
    run_dir = home() / "run" / run_key(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    name = display_name(config, run_dir)
    if uri is None:
        return run_dir, Later(run_dir, name)
    (run_dir / LATER).unlink(missing_ok=True)
    return run_dir, Recorder(uri, config.tracking.experiment, run_dir, name, parent_id)


def display_name(config: Config, run_dir: Path) -> str:
    """The name of a run in MLflow."""
    return run_name(config.label, config.seed, run_dir.name)


def show_in(config: Config, uri: str, parent_id: str, run_dir: Path) -> None:
    """Send MLflow what it lacks of a finished run as a run of this sweep."""
    publish_copy(uri, config.tracking.experiment, run_dir, display_name(config, run_dir), parent_id)


def _record_failure(run_dir: Path, recorder: Recorder, reason: str) -> str:
    """Traceback into a file, the reason in one line (which is returned) into status and tags."""
    reason = " ".join(reason.split())
    with contextlib.suppress(OSError):  # a full disk may be the reason
        (run_dir / "artifacts").mkdir(exist_ok=True)
        (run_dir / "artifacts" / TRACEBACK).write_text(traceback.format_exc())
        _write(run_dir / "status.json", json.dumps({"status": "failed", "reason": reason}))
    recorder.finish("FAILED", failed(reason))
    return reason


def _shown(config: Config) -> dict[str, Any]:
    """The config as it is recorded: without the credentials that a server's address may hold."""
    shown = config.model_dump(mode="json")
    shown["tracking"]["uri"] = re.sub(r"//[^/@]*@", "//***@", config.tracking.uri)
    return shown


def _execute(context: Context, run_dir: Path, enter: Callable[[str], None]) -> None:
    """Every stage that was asked for, and the curves of what was trained."""
    config = context.config
    artifacts = run_dir / "artifacts"
    artifacts.mkdir(exist_ok=True)
    (artifacts / TRACEBACK).unlink(missing_ok=True)  # of an earlier try
    _write(artifacts / "config.yaml", (run_dir / "config.yaml").read_text())

    if "bandit" in config.stages:
        enter("bandit")
        (artifacts / REPORT).write_text(bandit(context, run_dir))
    if config.pipeline:
        pipeline(context, artifacts, enter)
    context.metrics.close()
    training_curves(context.metrics, artifacts / "training.png", f"{config.label}, seed {config.seed}")


def make_ahead(config: Config, stages: Sequence[PipelineStage]) -> None:
    """Make the results of these stages that runs share; there is no run of it, and nothing is recorded."""
    before_compute(config.threads)
    join()
    cut = config.model_copy(update={"stages": list(stages)})
    with tempfile.TemporaryDirectory() as aside:
        pipeline(Context(cut, Store(home() / "store"), MetricsFile(Path(aside) / "metrics.jsonl")), None)


def _tags(config: Config) -> dict[str, str]:
    tags = {"config_hash": run_key(config), **environment_tags()}
    if "preference" in config.stages:
        if config.loss.order is not None:
            tags["pair_order"] = config.loss.order
        tags["loss_needs"] = ", ".join(get_loss(config.loss.name).needs)
        tags["data_fingerprint"] = training_mix(config.data).fingerprint
    if "soup" in config.stages:
        tags["soup"] = soup_text(config)
    if uses_rewards(config):
        tags[REWARDS] = told_rewards(config)
    return tags


def at_most_every(seconds: float, action: Callable[[], None]) -> Callable[[], None]:
    """The action, which is left out where it was done less than so many seconds ago."""
    last = -math.inf

    def limited() -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            action()
            last = time.monotonic()

    return limited


def _status(run_dir: Path) -> str | None:
    file = run_dir / "status.json"
    return json.loads(file.read_text())["status"] if file.exists() else None


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    os.replace(draft, path)
