"""What the stages of a run share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import concatenate_datasets

from bfpo_exp.config.data import Data
from bfpo_exp.config.schema import Config
from bfpo_exp.config.types import StreamName
from bfpo_exp.data.demos import DemoMix, load_demos
from bfpo_exp.data.mix import PairMix, label_cells, load_pairs
from bfpo_exp.distributed import group
from bfpo_exp.hashing import stable_hash
from bfpo_exp.models.numerics import resolved_attention
from bfpo_exp.store import Store
from bfpo_exp.tracking.metrics_file import MetricsFile


@dataclass(frozen=True)
class Weights:
    """A model's folder (or hub id), and the key of its content."""

    path: str
    key: str
    own: bool  # written by this project?


def device() -> torch.device:
    """The device on which models run: the first GPU that is visible, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Context:
    """A run's config, the store, where its metrics go first, and what sends them on from there.

    ``role`` is "first" while the stage of ``loss.first`` is done, whose metrics ``train/...`` and
    ``perf/...`` the run has under ``first/...``.
    """

    config: Config
    store: Store
    metrics: MetricsFile
    sync: Callable[[], None] = lambda: None
    role: Literal["train", "first"] = "train"

    def of_first_loss(self) -> Context:
        """The same run with the loss of the stage before in place of its own."""
        assert self.config.loss.first is not None
        config = self.config.model_copy(update={"loss": self.config.loss.first})
        return replace(self, config=config, role="first")

    @property
    def device(self) -> torch.device:
        """The device on which models run."""
        return device()

    def numerics(self, threads: int | None = None) -> dict[str, Any]:
        """What the last bits of a model's numbers depend on, beyond weights and data.

        ``threads`` are a stage's own, where they are not the run's.
        """
        model, device = self.config.model, self.device.type
        return {
            "dtype": model.dtype,
            "attention": resolved_attention(model),
            "device": device,
            "threads": (threads or self.config.threads) if device == "cpu" else None,
        }

    def training_numerics(self, threads: int | None = None) -> dict[str, Any]:
        """`numerics`, and what the last bits of trained weights depend on beyond them.

        The number of processes is not among it: a run may continue on another number.
        """
        return self.numerics(threads) | {"engine": self.config.deepspeed.model_dump()}

    def pair_mix(self, stream: StreamName) -> PairMix:
        """The training pairs of one stream."""
        return stream_mix(self.config.data, stream)

    def log_as(self, prefix: str, file: MetricsFile, step: int, values: Mapping[str, float]) -> None:
        """Write a stage's metrics to its own file and to the run's."""
        if not group().main:
            return
        named = {name if "/" in name else f"{prefix}/{name}": value for name, value in values.items()}
        file.append(step, named)
        self.metrics.append(step, self._as_role(named))
        self.sync()

    def copy_metrics(self, file: Path) -> None:
        """Give the run the metrics of a stage that was made before; what it has already is kept."""
        for record in MetricsFile(file).read() if group().main else ():
            self.metrics.append(record.step, self._as_role(record.metrics))

    def _as_role(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a preference stage under the names of the stage that it is in this run."""
        own = ("train/", "perf/")
        first = self.role == "first"
        return {
            f"first/{name.partition('/')[2]}" if first and name.startswith(own) else name: value
            for name, value in metrics.items()
        }


@dataclass(frozen=True)
class _Mix:
    """A data config that can key a cache: two of the same content are equal."""

    content: str
    data: Data = field(compare=False)

    @classmethod
    def of(cls, data: Data, **changes: Any) -> _Mix:
        data = data.model_copy(update=changes)
        return cls(data.model_dump_json(), data)


def stream_mix(data: Data, stream: StreamName) -> PairMix:
    """The training pairs of one stream of a mix; the other stream's sources are not read.

    Streams are kept apart so that mixes which share one share all that is made from it.
    """
    sources = {name: source for name, source in data.pairs.items() if source.stream == stream}
    return _pairs(_Mix.of(data, streams=[stream], batches="shuffle", pairs=sources, sft={}), False)


def training_mix(data: Data) -> PairMix:
    """The training pairs of all streams in use, put together from `stream_mix`."""
    mixes = [stream_mix(data, stream) for stream in data.streams]
    records = concatenate_datasets([mix.records for mix in mixes])
    return PairMix(
        records=records,
        counts={source: counts for mix in mixes for source, counts in mix.counts.items()},
        cells=label_cells(records),
        streams={source: stream for mix in mixes for source, stream in mix.streams.items()},
        fingerprint=stable_hash([mix.fingerprint for mix in mixes]),
    )


def heldout_mix(data: Data) -> PairMix:
    """The held-out pairs of every source, whatever streams are trained on."""
    streams = sorted({source.stream for source in data.pairs.values()})
    return _pairs(_Mix.of(data, streams=streams, batches="shuffle", sft={}), True)


def demo_mix(data: Data) -> DemoMix:
    """The demonstrations of a mix: the same whatever streams the preference stage trains on."""
    return _demos(_Mix.of(data, streams=[], batches="shuffle", pairs={}))


# The jobs of a sweep run in one process and share most of their data: read and clean it once.
@functools.lru_cache(32)
def _pairs(mix: _Mix, heldout: bool) -> PairMix:
    return load_pairs(mix.data, heldout=heldout)


@functools.lru_cache(32)
def _demos(mix: _Mix) -> DemoMix:
    return load_demos(mix.data)
