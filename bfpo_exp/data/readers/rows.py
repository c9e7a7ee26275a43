"""Typed access to the columns of one row, and the error of a row that breaks its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from bfpo_exp.data.records import Message

T = TypeVar("T")
ROLES = ("system", "user", "assistant")


class SchemaError(Exception):
    """A value that its schema does not allow; whoever knows the file and row tells the user."""

    def __init__(self, column: str, found: str, expected: str) -> None:
        super().__init__(f"column {column!r}: expected {expected}, found {found}")


def _shown(value: object) -> str:
    """What a wrong value is, without showing text, which may be harmful."""
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {value}"
    return type(value).__name__


class Row:
    """One row of a source; every method raises `SchemaError` for a value of another type."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def text(self, column: str) -> str:
        """Text, maybe empty."""
        value = self._values.get(column)
        if not isinstance(value, str):
            raise SchemaError(column, _shown(value), "text")
        return value

    def number(self, column: str) -> float | None:
        """A number, or None where the row has none."""
        value = self._values.get(column)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise SchemaError(column, _shown(value), "a number or null")
        return None if value is None else float(value)

    def choice(self, column: str, allowed: Sequence[T]) -> T:
        """One of the allowed values; name None among them where null is allowed."""
        value = self._values.get(column)
        for candidate in allowed:
            if value is candidate or (type(value) is type(candidate) and value == candidate):
                return candidate
        names = ", ".join("null" if a is None else str(a).lower() for a in allowed)
        raise SchemaError(column, _shown(value), f"one of {names}")

    def safety(self, column: str) -> float | None:
        """A safety label: true or 1 safe, false or 0 unsafe, a probability between, or null."""
        value = self._values.get(column)
        if value is None:
            return None
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise SchemaError(column, _shown(value), "true, false, a number from 0 to 1, or null")
        return float(value)

    def messages(self, column: str) -> list[Message]:
        """A list of turns, each with a known role and text."""
        value = self._values.get(column)
        expected = f"a list of messages with role ({', '.join(ROLES)}) and content"
        if not isinstance(value, list) or not value:
            raise SchemaError(column, "an empty list" if value == [] else _shown(value), expected)
        turns: list[Message] = []
        for number, turn in enumerate(value):
            if not isinstance(turn, dict):
                raise SchemaError(column, f"{_shown(turn)} as message {number}", expected)
            role, content = turn.get("role"), turn.get("content")
            if role not in ROLES:
                shown = repr(role) if isinstance(role, str) else _shown(role)
                raise SchemaError(column, f"role {shown} in message {number}", expected)
            if not isinstance(content, str):
                raise SchemaError(column, f"content {_shown(content)} in message {number}", expected)
            turns.append(Message(role=role, content=content))
        return turns

    def answered(self, column: str) -> tuple[list[Message], str]:
        """Messages that end with the assistant's turn: those before it, and its text."""
        turns = self.messages(column)
        if turns[-1]["role"] != "assistant":
            raise SchemaError(
                column, f"a last turn of the {turns[-1]['role']}", "the assistant's as last turn"
            )
        return turns[:-1], turns[-1]["content"]

    def prompt(self, column: str) -> list[Message]:
        """A prompt: text as one user turn, or messages that end with the user's turn."""
        if isinstance(self._values.get(column), str):
            return [Message(role="user", content=self.text(column))]
        turns = self.messages(column)
        if turns[-1]["role"] != "user":
            raise SchemaError(column, f"a last turn of the {turns[-1]['role']}", "the user's as last turn")
        return turns
