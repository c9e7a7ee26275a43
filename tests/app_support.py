"""What the command leaves behind when it is run in the process of the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that a bad input ends in."""
        assert self.code == 2, self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


Command = Callable[..., Done]
