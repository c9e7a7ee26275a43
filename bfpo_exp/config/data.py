"""The data mix: sources of pairs and demonstrations, their format, and who orders pairs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from bfpo_exp.config.rewards import Output
from bfpo_exp.config.types import Count, Seed, StreamName, Strict


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


Size = Annotated[int | float | None, BeforeValidator(_size)]


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
