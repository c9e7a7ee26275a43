"""Real dirt, by rule: every pair that is dropped is counted under exactly one reason.

| reason | the pair is dropped because |
|---|---|
| `tie` | its source says that neither response is better (equal scores) |
| `prompt_mismatch` | its two responses answer different conversations |
| `empty_response` | a response has no text but whitespace |
| `identical_responses` | both responses are the same text, whitespace around it aside |
| `contradiction` | the source says two things (below): all pairs involved go |
| `duplicate` | the same prompt, responses, order and labels came before; the first stays |

The first reason that applies, in this order, is the one counted.  The rules look at the whole
source, whatever share of it is used afterwards.

Two kinds of contradiction are looked for: the same response to the same prompt labelled both safe
and unsafe (in any rows, dropped ones included), and the same prompt and responses with the opposite
order of helpfulness or of safety (in rows that no earlier rule drops).  A missing label contradicts
nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from datasets import Dataset

from bfpo_exp.data.records import Message

REASONS = ("tie", "prompt_mismatch", "empty_response", "identical_responses", "contradiction", "duplicate")
DEMO_REASONS = ("empty_response", "duplicate")
KEEP = ""


def text_key(prompt: Sequence[Message], response: str) -> int:
    """64 bits that stand for a prompt and a response to it."""
    digest = hashlib.blake2b(digest_size=8)
    for text in (*(part for turn in prompt for part in (turn["role"], turn["content"])), response):
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return int.from_bytes(digest.digest(), "little")


def pair_reasons(staged: Dataset) -> np.ndarray:
    """Why each pair of a source is dropped: a name of `REASONS`, or "" to keep it; (rows,) of str.

    ``staged`` has `arrow.STAGED_FEATURES` and holds all rows of one source.
    """
    keys, early = _keys(staged)
    labels = staged.select_columns(["safe_w", "safe_l", "safer", "ordered"]).to_pandas()
    order = labels["ordered"].astype(int)
    safer = labels["safer"].map({"w": 1, "l": -1}).fillna(0).astype(int)

    # One way to write a pair, whichever response stands first: the smaller key first.
    turned = keys["w"] > keys["l"]
    facts = pd.DataFrame(
        {
            "first": keys["w"].where(~turned, keys["l"]),
            "second": keys["l"].where(~turned, keys["w"]),
            "order": order.where(~turned, -order),
            "safer": safer.where(~turned, -safer),
            "safe_first": labels["safe_w"].where(~turned, labels["safe_l"]).astype(float),
            "safe_second": labels["safe_l"].where(~turned, labels["safe_w"]).astype(float),
        }
    )
    reasons = early.to_numpy(copy=True)
    reasons[(reasons == KEEP) & (_labelled_both_ways(facts) | _opposite(facts, early == KEEP)).to_numpy()] = (
        "contradiction"
    )
    alive = facts[reasons == KEEP]
    reasons[alive.index[alive.duplicated()]] = "duplicate"
    return reasons


def demo_reasons(demos: Dataset) -> np.ndarray:
    """The same for demonstrations (`arrow.DEMO_FEATURES`): names of `DEMO_REASONS`; (rows,) of str."""
    keys = np.fromiter((text_key(d["prompt"], d["response"]) for d in demos), np.uint64, len(demos))
    empty = np.fromiter((not text.strip() for text in demos["response"]), bool, len(demos))
    reasons = np.where(empty, "empty_response", KEEP).astype(object)
    alive = pd.Series(keys)[~empty]
    reasons[alive.index[alive.duplicated()]] = "duplicate"
    return reasons


def _keys(staged: Dataset) -> tuple[pd.DataFrame, pd.Series]:
    """The keys of the two responses, and the reasons that show in a pair by itself."""
    w, l, early = [], [], []  # noqa: E741
    for batch in staged.select_columns(["prompt", "response_w", "response_l", "dirt"]).iter(batch_size=1000):
        for prompt, winner, loser, dirt in zip(
            batch["prompt"], batch["response_w"], batch["response_l"], batch["dirt"], strict=True
        ):
            w.append(text_key(prompt, winner))
            l.append(text_key(prompt, loser))
            winner, loser = winner.strip(), loser.strip()
            blank = "empty_response" if not (winner and loser) else ""
            early.append(dirt or blank or ("identical_responses" if winner == loser else KEEP))
    return pd.DataFrame({"w": w, "l": l}, dtype=np.uint64), pd.Series(early, dtype=object)


def _labelled_both_ways(facts: pd.DataFrame) -> pd.Series:
    """Pairs with a response that some row labels safe and some row unsafe; (rows,) of bool."""
    keys = pd.concat([facts["first"], facts["second"]], ignore_index=True)
    labels = pd.concat([facts["safe_first"], facts["safe_second"]], ignore_index=True)
    both = np.intersect1d(keys[labels > 0.5], keys[labels < 0.5])
    return facts["first"].isin(both) | facts["second"].isin(both)


def _opposite(facts: pd.DataFrame, alive: pd.Series) -> pd.Series:
    """Pairs that stand in the source in both orders; (rows,) of bool."""
    groups = facts[alive].groupby(["first", "second"])[["order", "safer"]]
    disputed = (groups.transform("min") < 0) & (groups.transform("max") > 0)
    return disputed.any(axis=1).reindex(facts.index, fill_value=False)
