"""The one error that a user may see, and the search for the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A bad input, in one line: what was given, what is allowed, the nearest valid name.

    Raised at the edge, before any compute is spent; the command prints the message without a
    traceback and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


MOST_NAMES = 20  # beyond which a list of names is no help


def unknown(what: str, given: object, allowed: Iterable[object]) -> UserError:
    """An error for a name outside a closed list, with the nearest valid name.

    >>> print(unknown("loss", "bfpx", ["dpo", "ipo", "bfpo"]))
    unknown loss 'bfpx'; allowed: bfpo, dpo, ipo; nearest: 'bfpo'
    """
    names = sorted(str(name) for name in allowed)
    near = difflib.get_close_matches(str(given), names, n=5, cutoff=0.5)
    hint = f"; nearest: {near[0]!r}" if near else ""
    if len(names) > MOST_NAMES:
        few = near or names[:5]
        listed = f"{', '.join(few)}, ... ({len(names)} in all)"
    else:
        listed = ", ".join(names) or "none"
    return UserError(f"unknown {what} {given!r}; allowed: {listed}{hint}")
