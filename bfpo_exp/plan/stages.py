"""How long each stage of a run trains, and on how much: from the config alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bfpo_exp.config.data import Data, Source
from bfpo_exp.config.schema import Config, Loss
from bfpo_exp.config.training import Optimisation
from bfpo_exp.losses import StagedLoss, get_loss
from bfpo_exp.rewards.use import trains_reward_model
from bfpo_exp.train.loop import total_steps


@dataclass(frozen=True)
class StagePlan:
    """The steps of one stage.

    Attributes:
        name: ``base``, ``sft``, ``reward``, ``preference`` or ``preference, first loss``.
        unit: what a batch counts, ``pairs``, ``prompts`` (of samples) or ``sequences``.
        optimisation: its settings.
        processes: that share out each batch.
        length: tokens of a sequence, at most.
        rows: pairs or sequences that it trains on, at most; None where that is known only from the data.
        loss: of a preference stage.
        packed: whether several sequences share a row of that length, so that there are fewer passes.
    """

    name: str
    unit: str
    optimisation: Optimisation
    processes: int
    length: int
    rows: int | None
    loss: Loss | None = None
    packed: bool = False

    @property
    def microbatch(self) -> int:
        """Pairs or sequences of a forward pass in one process, where each is as long as it may be."""
        most = min(self.optimisation.microbatch, self.share)
        budget = getattr(self.optimisation, "tokens_per_microbatch", None)
        return most if budget is None else max(1, min(most, budget // (self.sequences * self.length)))

    @property
    def share(self) -> int:
        """Pairs or sequences of a step in one process."""
        return -(-self.optimisation.batch // self.processes)

    @property
    def accumulation(self) -> int:
        """Forward passes of a step in one process, at most."""
        return -(-self.share // self.microbatch)

    @property
    def sequences(self) -> int:
        """Sequences of one pair, prompt or row."""
        if self.unit == "prompts":
            assert self.loss is not None
            return self.loss.hyperparameters["samples"]
        return 2 if self.unit == "pairs" else 1

    @property
    def steps(self) -> int | None:
        """Optimisation steps; None where they follow from a number of rows that is not known."""
        if self.optimisation.steps is None and self.rows is None:
            return None
        return total_steps(self.optimisation, self.rows or 0)

    @property
    def epochs(self) -> float | None:
        """Passes over the rows."""
        if self.optimisation.epochs is not None:
            return self.optimisation.epochs
        return self.optimisation.steps * self.optimisation.batch / self.rows if self.rows else None  # type: ignore[operator]

    @property
    def micro_tokens(self) -> int:
        """Tokens of a forward pass in one process, at most, padding included."""
        return self.microbatch * self.sequences * self.length

    @property
    def step_tokens(self) -> int:
        """Tokens of a step of all processes, at most; the prompt counts once for each response."""
        return self.optimisation.batch * self.sequences * self.length

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole stage, at most."""
        return None if self.steps is None else self.steps * self.step_tokens


def stage_plans(config: Config, processes: int) -> list[StagePlan]:
    """The stages of a run that train, in their order."""
    data, train = config.data, config.train
    length, plans = data.format.max_length, []
    if "base" in config.stages and config.model.pretraining is not None:
        samples = config.model.pretraining.samples
        plans.append(StagePlan("base", "sequences", train.base, processes, length, samples))
    if "sft" in config.stages:
        demonstrations = _rows(data.sft.values())
        longest = train.sft.max_length or length
        packed = train.sft.packing
        plans.append(
            StagePlan("sft", "sequences", train.sft, processes, longest, demonstrations, packed=packed)
        )
    if trains_reward_model(config):
        labelled = _rows(source for source in data.pairs.values() if source.stream in data.streams)
        plans.append(StagePlan("reward", "pairs", train.reward, processes, length, labelled))
    if "preference" in config.stages:
        plans += _preference(config.loss, data, train, processes, "preference")
    return plans


def _preference(
    loss: Loss, data: Data, optimisation: Optimisation, processes: int, name: str
) -> list[StagePlan]:
    """A preference stage, after the one that its loss needs first."""
    before: list[StagePlan] = []
    if loss.first is not None:
        before = _preference(loss.first, data, optimisation, processes, f"{name}, first loss")
    streams = loss.streams or data.streams
    rows = _rows(source for source in data.pairs.values() if source.stream in streams)
    spec = get_loss(loss.name)
    # Rows of one that samples are prompts, at most as many as pairs, passed over `epochs` times.
    if isinstance(spec, StagedLoss) and spec.samples:
        rows = rows and rows * loss.hyperparameters["epochs"]
        return [StagePlan(name, "prompts", optimisation, processes, data.format.max_length, rows, loss)]
    return [*before, StagePlan(name, "pairs", optimisation, processes, data.format.max_length, rows, loss)]


def _rows(sources: Iterable[Source]) -> int | None:
    """Rows of the sources at most; None if one of them takes a share of rows not yet counted."""
    total = 0
    for source in sources:
        if not isinstance(source.size, int):
            return None
        total += source.size
    return total
