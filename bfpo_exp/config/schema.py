"""The type and the range of every value that a user may set.

``conf/*.yaml`` holds the defaults and a line of explanation for each key; this module, with those that
it imports from this folder, holds what is allowed.  There are no defaults here, so the two cannot drift
apart; only a source of data, which users add by names of their own, has its defaults in its class.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from bfpo_exp.config.data import Data
from bfpo_exp.config.rewards import Combine, Reward
from bfpo_exp.config.soup import Soup
from bfpo_exp.config.training import Deepspeed, Train
from bfpo_exp.config.types import Count, NonNegative, Seed, Share, StreamName, Strict

Stage = Literal["base", "sft", "reward", "reference", "preference", "soup", "evaluate", "bandit"]
STREAMS: tuple[StreamName, ...] = ("helpfulness", "safety")


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
