"""The bandit itself: actions, pairs in helpfulness order, the ranking that is wanted, rankings as text.

Actions are numbered from 1, as y1 .. yn in the paper.  ``helpfulness`` lists all of them, the most
helpful first; ``safe[i - 1]`` is 1 if y_i is safe, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

TIE = 1e-6  # nats; log-probs that are closer are a tie, which is no ranking


def pairs(helpfulness: Sequence[int]) -> list[tuple[int, int]]:
    """All n (n - 1) / 2 pairs as (more helpful, less helpful) action numbers.

    >>> pairs([2, 1, 3])
    [(2, 1), (2, 3), (1, 3)]
    """
    return list(combinations(helpfulness, 2))


def wanted_ranking(safe: Sequence[int], helpfulness: Sequence[int]) -> list[int]:
    """The global preference of the paper's Figure 3, best first.

    Safe actions in the order of helpfulness, then the unsafe ones in its reverse: the more helpful
    a harmful action is, the worse.

    >>> ranking_text(wanted_ranking([1, 0, 1, 0], [1, 2, 3, 4]))
    'y1>y3>y4>y2'
    """
    is_safe = [action for action in helpfulness if safe[action - 1]]
    is_unsafe = [action for action in helpfulness if not safe[action - 1]]
    return is_safe + is_unsafe[::-1]


def ranking_text(ranking: Sequence[int]) -> str:
    """A strict ranking as text.

    >>> ranking_text([2, 1])
    'y2>y1'
    """
    return ">".join(f"y{action}" for action in ranking)


def ranking_of(logps: Sequence[float]) -> str:
    """The actions from the most to the least probable; ``=`` stands between those that tie.

    ``logps`` are log-probs in nats (they still differ where probabilities round to 0).

    >>> ranking_of([-1.0, -3.0, -2.0, -3.0])
    'y1>y3>y2=y4'
    """
    order = sorted(range(len(logps)), key=lambda i: -logps[i])
    signs = [">" if logps[i] - logps[j] > TIE else "=" for i, j in pairwise(order)]
    return "".join(f"y{i + 1}{sign}" for i, sign in zip(order, [*signs, ""], strict=True))


def describe(action: int, safe: Sequence[int], helpfulness: Sequence[int]) -> str:
    """What an action is, in words for a legend.

    >>> [describe(action, [1, 0, 1, 0], [1, 2, 3, 4]) for action in (1, 2, 4)]
    ['y1: most helpful, safe', 'y2: helpfulness rank 2, unsafe', 'y4: least helpful, unsafe']
    """
    rank = list(helpfulness).index(action) + 1
    ends = {1: "most helpful", len(helpfulness): "least helpful"}
    return (
        f"y{action}: {ends.get(rank, f'helpfulness rank {rank}')}, {'safe' if safe[action - 1] else 'unsafe'}"
    )
