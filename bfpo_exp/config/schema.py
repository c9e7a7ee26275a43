"""The type and the range of every value that a user may set.

``conf/*.yaml`` holds the defaults and a line of explanation for each key; this module holds what
is allowed.  There are no defaults here, so the two cannot drift apart; only a source of data, which
users add by names of their own, has its defaults in this file.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bfpo_exp.config.rewards import Combine, Output, Reward
from bfpo_exp.config.soup import Soup
from bfpo_exp.config.types import Count, NonNegative, Positive, Seed, Share, StreamName, Strict

Stage = Literal["base", "sft", "reward", "reference", "preference", "soup", "evaluate", "bandit"]
LossOn = Literal["last", "assistant", "all"]
STREAMS: tuple[StreamName, ...] = ("helpfulness", "safety")


def _size(value: Any) -> Any:
    """Sizes are whole numbers of rows, or fractions; 1 means one row and 1.0 all of them."""
    if value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a size is a number of rows, a fraction in (0, 1], or null for all rows")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError("a fraction lies in (0, 1]; for a number of rows write a whole number")
    if isinstance(value, int) and value < 0:
        raise ValueError("a number of rows is not negative")
    return value


def _trainable(value: Any) -> Any:
    """All weights, or those of the modules whose names end in one of the suffixes."""
    if value == "all" or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError("allowed: 'all', or a list of suffixes of module names such as [mlp.down_proj]")


Trainable = Annotated[Literal["all"] | list[str], BeforeValidator(_trainable)]
Size = Annotated[int | float | None, BeforeValidator(_size)]


# ---------------------------------------------------------------- data


class Source(Strict):
    """One data set: where its rows are, how they read, how many are taken.

    Attributes:
        reader: what a row means: ``pku_saferlhf``, ``columns``, ``world``, ... (docs/data.md).
        hub, revision, split: a data set on the hub, at a commit; or
        files: local files, JSON lines or Parquet, compressed or not, globs allowed.
        size: rows, or a fraction in (0, 1], drawn at random; null: all.
        columns: of ``reader=columns``: which column holds which field.
        options: of the reader.
    """

    reader: str
    hub: str | None = None
    revision: str | None = None
    split: str = "train"
    files: list[str] | None = None
    size: Size = None
    columns: dict[str, str] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)


class PairSource(Source):
    """A source of preference pairs, and the stream that it feeds.

    ``assume_safe`` labels every response without a label safe, as the paper does for UltraFeedback.
    """

    stream: StreamName
    assume_safe: bool = False


class SftSource(Source):
    """A source of demonstrations; of a preference pair, ``take`` names the response."""

    take: Literal["conversation", "more_helpful", "safer"]


class Ranker(Strict):
    """Who supplies a helpfulness order that the data lacks."""

    kind: Literal["none", "column", "model", "longer"]
    columns: list[str] | None
    model: str | None
    output: Output

    @model_validator(mode="after")
    def _complete(self) -> Ranker:
        if self.kind == "column" and (self.columns is None or len(self.columns) != 2):
            raise ValueError(
                "ranker kind 'column' needs columns=[score of the first response, of the second]"
            )
        if self.kind == "model" and not self.model:
            raise ValueError("ranker kind 'model' needs model=<folder of a sequence classifier>")
        return self


class Format(Strict):
    """The one rule for chat format and length."""

    template: str | None
    system: str | None
    max_length: Count
    max_prompt_length: Count
    close_truncated: bool

    @model_validator(mode="after")
    def _room(self) -> Format:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} leaves no room for a response "
                f"within max_length={self.max_length}"
            )
        return self


class Data(Strict):
    """The mix: sources of pairs in two streams, demonstrations for SFT, format, ranker."""

    name: str
    seed: Seed
    streams: list[StreamName]
    batches: Literal["balanced", "shuffle"]
    heldout: Annotated[float, Field(ge=0, lt=1)]
    pairs: dict[str, PairSource]
    sft: dict[str, SftSource]
    ranker: Ranker
    format: Format

    @model_validator(mode="after")
    def _mix(self) -> Data:
        if not self.streams:
            raise ValueError("the data mix is empty: streams=[]; allowed: helpfulness, safety")
        for stream in self.streams:
            sources = {n: s for n, s in self.pairs.items() if s.stream == stream}
            if not any(source.size != 0 for source in sources.values()):
                raise ValueError(
                    f"the data mix is empty: no source with rows feeds the stream {stream!r} "
                    f"(sources: {', '.join(self.pairs) or 'none'})"
                )
        if self.batches == "balanced" and len(set(self.streams)) != 2:
            raise ValueError(
                f"batches=balanced takes as many pairs from each of two streams, but streams="
                f"{self.streams}; use batches=shuffle"
            )
        return self


# ---------------------------------------------------------------- model


class Tokenizer(Strict):
    """Where the tokenizer comes from: the model's folder, the world's words, or trained BPE."""

    kind: Literal["pretrained", "world", "bpe"]
    vocab_size: Annotated[int, Field(ge=300)] | None


class Pretraining(Strict):
    """The corpus from which a random model becomes a base model (generated world only)."""

    samples: Count
    harmful: Share
    recognition: Share
    seed: Seed


class Model(Strict):
    """A policy: pretrained weights at ``path``, or random weights of ``architecture``.

    ``shape`` declares fields of the config of the weights at ``path``, so that a run can be planned
    without them; it is held to them when they are loaded.
    """

    name: str
    path: Annotated[str, AfterValidator(os.path.expanduser)] | None
    revision: str | None
    trust_remote_code: bool
    architecture: dict[str, Any] | None
    shape: dict[str, Any] | None
    tokenizer: Tokenizer
    pretraining: Pretraining | None
    dtype: Literal["float32", "bfloat16"]
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"]
    forward: Literal["auto", "shared", "padded"]
    seed: Seed

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                "give either path (pretrained weights) or architecture (random weights), not "
                + ("neither; set model.path=<folder or hub id>" if self.path is None else "both")
            )
        if self.shape is not None and (self.architecture is not None or "model_type" not in self.shape):
            raise ValueError(
                "shape declares the config of pretrained weights, model_type included; "
                f"got shape={self.shape}, architecture={self.architecture}"
            )
        return self


# ---------------------------------------------------------------- training


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
        stage = (self.config or {}).get("zero_optimization", {}).get("stage")
        if self.name != "none" and stage != int(self.name[4]):
            raise ValueError(f"name={self.name}, but config.zero_optimization.stage={stage}")
        return self


# ---------------------------------------------------------------- evaluation


class Task(Strict):
    """One task of the benchmark: what is asked, how it is judged, which score it feeds."""

    kind: str
    feeds: Literal["helpfulness", "disc", "gen", "over_refusal", "none"]
    size: Count
    options: dict[str, Any]


class Sampling(Strict):
    """How responses are drawn."""

    temperature: NonNegative
    max_new_tokens: Count
    batch: Count


class Eval(Strict):
    """The benchmark: a list of tasks on one split, and how responses are drawn."""

    name: str
    split: Literal["dev", "test"]
    seed: Seed
    choice_score: Literal["mean", "sum"]
    sampling: Sampling
    tasks: dict[str, Task]


class Tracking(Strict):
    """Where runs are recorded."""

    uri: str
    experiment: Annotated[str, Field(min_length=1)]


class Loss(BaseModel):
    """A loss by name, what it trains on, and its own hyper-parameters.

    The hyper-parameters are those of the loss's function and are checked against its signature
    (see ``bfpo_exp.losses.registry``).  ``first`` is the loss of a stage before this one.  A loss that
    compares no pairs (``bfpo_exp.losses.staged``) has no ``order``.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    order: Literal["helpfulness", "safety", "stream"] | None
    logps: Literal["sum", "mean"]
    reference_free: bool
    streams: list[StreamName] | None
    first: Loss | None

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The values beyond those that every loss has."""
        return dict(self.model_extra or {})


class Bandit(Strict):
    """The paper's bandit: a grid of settings on one problem (checked in ``bfpo_exp.bandit.settings``)."""

    methods: list[str]
    taus: list[float]
    alphas: list[float]
    b1s: list[float]
    safe: list[int]
    helpfulness: list[int]
    steps: int
    batch: int | None
    repeats: int
    lr: float


class Config(Strict):
    """One run."""

    seed: Seed
    threads: Count
    stages: Annotated[list[Stage], Field(min_length=1)]
    method: str | None
    model: Model
    data: Data
    loss: Loss
    reward: Reward
    combine: Combine
    deepspeed: Deepspeed
    train: Train
    eval: Eval
    tracking: Tracking
    soup: Soup
    bandit: Bandit | None

    @property
    def label(self) -> str:
        """The name of the row in a table: the method's, else the loss's."""
        return self.method or self.loss.name

    @property
    def trained_streams(self) -> list[StreamName]:
        """The streams that the loss trains on: its own choice, else all of the mix."""
        return self.loss.streams or self.data.streams

    @property
    def pipeline(self) -> list[Stage]:
        """The stages on the way from data to scores, which the bandit is not on."""
        return [stage for stage in self.stages if stage != "bandit"]

    @model_validator(mode="after")
    def _bandit_has_settings(self) -> Config:
        if "bandit" in self.stages and self.bandit is None:
            raise ValueError("stages has bandit, but bandit has no settings; use experiment=bandit")
        return self

    @model_validator(mode="after")
    def _soup_is_made_of_runs(self) -> Config:
        if "soup" not in self.stages:
            if self.soup.runs:
                raise ValueError("soup.runs is set, but stages has no soup; set stages=[soup,evaluate]")
            return self
        if not self.soup.runs:
            raise ValueError(
                "stages has soup, but soup.runs is empty; set soup.runs=[RUN,RUN] soup.weights=[...]"
            )
        if others := [stage for stage in self.stages if stage not in ("soup", "evaluate")]:
            raise ValueError(
                f"stages={self.stages}: a soup is made of finished runs alone; leave out {others[0]}"
            )
        return self
