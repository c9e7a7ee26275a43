"""How the stages train: which weights, how long, at what rate, with which engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bfpo_exp.config.types import Count, NonNegative, Positive, Seed, Share, Strict

LossOn = Literal["last", "assistant", "all"]


def _trainable(value: Any) -> Any:
    """All weights, or those of the modules whose names end in one of the suffixes."""
    if value == "all" or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError("allowed: 'all', or a list of suffixes of module names such as [mlp.down_proj]")


Trainable = Annotated[Literal["all"] | list[str], BeforeValidator(_trainable)]


class Optimisation(Strict):
    """How one stage trains: which weights, how long, at what rate."""

    trainable: Trainable
    steps: Annotated[int, Field(ge=0)] | None
    epochs: Positive | None
    batch: Count
    microbatch: Count
    lr: Positive
    schedule: Literal["linear", "cosine", "constant"]
    warmup: Share
    weight_decay: NonNegative
    betas: tuple[Share, Share]
    clip: Positive | None
    log_every: Count
    checkpoint_every: Count | None
    keep_checkpoints: Count
    optimizer: Literal["adamw", "rmsprop", "adamw_8bit"]
    gradient_checkpointing: bool

    @model_validator(mode="after")
    def _length(self) -> Optimisation:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs, got steps={self.steps}, epochs={self.epochs}")
        return self


class SeededOptimisation(Optimisation):
    """A stage that a sweep shares: its seed and its CPU threads are its own, not the run's."""

    seed: Seed
    threads: Count


class SftOptimisation(SeededOptimisation):
    """Supervised fine-tuning: which tokens of a conversation are trained, and how rows are made of them."""

    loss_on: LossOn
    packing: bool
    max_length: Count | None


class RewardOptimisation(SeededOptimisation):
    """Training a reward model; a share ``heldout`` of the prompts is kept for measuring it."""

    heldout: Annotated[float, Field(ge=0, lt=1)]


class Lora(Strict):
    """Low-rank adapters: the update of a matrix is ``alpha / rank`` times a product of two thin ones.

    ``target`` holds suffixes of the names of linear modules, as ``train.trainable`` does.
    """

    rank: Count
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target: Annotated[list[str], Field(min_length=1)]


class Train(Optimisation):
    """The preference stage, with the stages before it."""

    tokens_per_microbatch: Count | None
    compile: bool
    reference: Literal["cached", "live"]
    lora: Lora | None
    base: SeededOptimisation
    sft: SftOptimisation
    reward: RewardOptimisation


class Deepspeed(Strict):
    """Which engine steps the weights, with DeepSpeed's own settings."""

    name: Literal["none", "zero1", "zero2", "zero3", "zero3_offload"]
    config: dict[str, Any] | None

    @model_validator(mode="after")
    def _settings(self) -> Deepspeed:
        if (self.name == "none") != (self.config is None):
            raise ValueError(
                f"config belongs to the ZeRO stages, but name={self.name}, config={self.config}; choose "
                "deepspeed=none|zero1|zero2|zero3|zero3_offload"
            )
        if self.name != "none" and self.stage != int(self.name[4]):
            raise ValueError(f"name={self.name}, but config.zero_optimization.stage={self.stage}")
        return self

    @property
    def stage(self) -> int | None:
        """Of ZeRO: what the processes share out (1: optimiser state, 2: gradients too, 3: weights too)."""
        return (self.config or {}).get("zero_optimization", {}).get("stage")
