"""The kinds of values that the nodes of a config are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
StreamName = Literal["helpfulness", "safety"]


class Strict(BaseModel):
    """A config node: no unknown keys, read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True)
