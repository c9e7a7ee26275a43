"""The config node ``soup``: which runs' models are averaged, and how."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from bfpo_exp.config.types import Finite, Strict


def _run_name(value: Any) -> Any:
    """A key of digits alone is read as a number before it gets here."""
    if isinstance(value, float):
        raise ValueError("a key that reads as a number has to stand in quotes, as '12e4'")
    return str(value) if type(value) is int else value


class Soup(Strict):
    """The weighted mean of the models of finished runs, which the stage ``soup`` makes.

    ``runs`` are folders, keys or names of runs; ``extrapolate`` allows weights outside of [0, 1].
    """

    runs: list[Annotated[str, BeforeValidator(_run_name)]]
    weights: list[Finite]
    extrapolate: bool

    @model_validator(mode="after")
    def _shares(self) -> Soup:
        if len(self.runs) != len(self.weights):
            raise ValueError(
                f"{len(self.runs)} runs, but {len(self.weights)} weights ({self.weights}); give one to each"
            )
        if self.weights and abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights={self.weights} sum to {sum(self.weights):g}; they have to sum to 1")
        if not self.extrapolate and any(not 0 <= weight <= 1 for weight in self.weights):
            raise ValueError(
                f"weights={self.weights} are not all within [0, 1]; to allow that set soup.extrapolate=true"
            )
        return self
