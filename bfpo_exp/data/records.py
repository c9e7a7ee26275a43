"""The canonical pair record, of which every order that a loss trains on is a view."""

from __future__ import annotations

from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Prompt = list[Message]


class PairRecord(TypedDict):
    """One preference pair, stored once: (more helpful, less helpful), whatever their safety.

    Where the helpfulness order is unknown, ``ordered`` is false and the two responses stand in
    the order of their source.  A label that the data lacks is ``None``, never guessed.
    """

    prompt: list[Message]  # every turn up to the response; the last one is the user's
    response_w: str  # y_hw, the more helpful response
    response_l: str  # y_hl, the less helpful response
    ordered: bool  # is it known which response is more helpful?
    ranker: str  # who said so: "data", a ranker's name, or "none"
    safe_w: float | None  # s(y_hw): 1 safe, 0 unsafe, or a probability of being safe
    safe_l: float | None  # s(y_hl)
    safer: Literal["w", "l"] | None  # which of the two is safer, where the data says
    stream: str  # "helpfulness" or "safety"
    source: str  # the source's name in the config
    row: int  # the row's number in its source, from 0


class DemoRecord(TypedDict):
    """One demonstration for supervised fine-tuning."""

    prompt: list[Message]
    response: str
    source: str
    row: int
