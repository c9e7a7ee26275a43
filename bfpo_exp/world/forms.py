"""A sentence with slots, which writes texts and reads them back: the grammar's only mechanism."""

from __future__ import annotations

import re
from string import Formatter

from bfpo_exp.world.lexicon import SLOTS


class Form:
    """One sentence of the grammar, with slots in braces; `parse` is the exact inverse of `fill`.

    >>> form = Form("take the {tool} .")
    >>> form.fill(tool="spoon")
    'take the spoon .'
    >>> form.parse("take the spoon ."), form.parse("take the spoon")
    ({'tool': 'spoon'}, None)
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        pieces = list(Formatter().parse(pattern))
        self.slots = tuple(slot for _, slot, _, _ in pieces if slot)
        self._regex = re.compile(
            "".join(
                re.escape(literal) + (f"(?P<{slot}>{'|'.join(SLOTS[slot])})" if slot else "")
                for literal, slot, _, _ in pieces
            )
        )

    def fill(self, **values: str) -> str:
        """The sentence with its slots filled; values of slots that it lacks are ignored."""
        return self.pattern.format_map(values)

    def parse(self, text: str) -> dict[str, str] | None:
        """The slot values, or ``None`` where the WHOLE text is not this sentence."""
        match = self._regex.fullmatch(text)
        return match.groupdict() if match else None

    def words(self) -> frozenset[str]:
        """Every word that the sentence can contain, whatever fills its slots."""
        fixed = re.sub(r"\{\w+\}", " ", self.pattern).split()
        return frozenset(fixed).union(*(value.split() for slot in self.slots for value in SLOTS[slot]))
