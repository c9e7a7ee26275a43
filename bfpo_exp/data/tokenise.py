"""From records to the token ids that are trained on."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from datasets import Dataset, Features, List, Value

from bfpo_exp.config.schema import STREAMS
from bfpo_exp.config.training import LossOn
from bfpo_exp.data.arrow import derive
from bfpo_exp.data.chat import ChatFormat, Tokens
from bfpo_exp.data.conversations import Demonstration, encode_demonstrations
from bfpo_exp.errors import UserError

PROBLEMS = ("special_tokens", "response_cut_empty")
IDS = List(Value("int32"))
TOKENISED_PAIRS = Features(
    {
        "prompt_ids": IDS,
        "w_ids": IDS,  # the more helpful response, with its end of turn
        "l_ids": IDS,
        "safe_w": Value("float32"),  # NaN where the label is missing
        "safe_l": Value("float32"),
        "safer": Value("int8"),  # +1 the more helpful response is safer, -1 the other, 0 unknown
        "ordered": Value("bool"),
        "stream": Value("int8"),  # index into STREAMS
        "row": Value("int64"),  # index into the records
    }
)
TOKENISED_DEMOS = Features(
    {
        "prompt_ids": IDS,  # before the first trained token
        "response_ids": IDS,
        "trained": List(Value("bool")),  # of each token of response_ids
        "row": Value("int64"),
    }
)
SAFER = {"w": 1, "l": -1, None: 0}


def tokenise_pairs(records: Dataset, chat: ChatFormat) -> tuple[Dataset, dict[str, int]]:
    """Token ids of pairs (`arrow.PAIR_FEATURES` to `TOKENISED_PAIRS`), and what happened.

    Counts: ``pairs`` = dropped for each of `PROBLEMS` + ``tokenised``; of the tokenised pairs,
    ``truncated_prompts`` and ``truncated_responses`` (responses, two a pair).  Every row is seen
    to hold one BOS and at most one end of turn, at its end.  `UserError` if no pair is left.
    """
    counts: Counter[str] = Counter()

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        responses = list(zip(batch["response_w"], batch["response_l"], strict=True))
        encoded = chat.encode_batch(batch["prompt"], responses)
        kept = _kept(encoded, chat, counts)
        return {
            "prompt_ids": [encoded[i][0].prompt_ids for i in kept],
            "w_ids": [encoded[i][0].response_ids for i in kept],
            "l_ids": [encoded[i][1].response_ids for i in kept],
            "safe_w": [_label(batch["safe_w"][i]) for i in kept],
            "safe_l": [_label(batch["safe_l"][i]) for i in kept],
            "safer": [SAFER[batch["safer"][i]] for i in kept],
            "ordered": [batch["ordered"][i] for i in kept],
            "stream": [STREAMS.index(batch["stream"][i]) for i in kept],
            "row": [rows[i] for i in kept],
        }

    tokens = derive(records, encode, TOKENISED_PAIRS, ["pairs", chat.fingerprint])
    return tokens, _counts("pairs", len(records), len(tokens), counts, chat)


def tokenise_demos(
    records: Dataset, chat: ChatFormat, loss_on: LossOn = "last"
) -> tuple[Dataset, dict[str, int]]:
    """Token ids of demonstrations (`arrow.DEMO_FEATURES` to `TOKENISED_DEMOS`), as for pairs.

    ``loss_on`` says which tokens are trained, see `conversations.encode_demonstrations`.
    """
    counts: Counter[str] = Counter()

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        encoded = encode_demonstrations(chat, batch["prompt"], batch["response"], loss_on)
        kept = []
        for place, tokens in enumerate(encoded):
            if tokens.problem:
                counts[tokens.problem] += 1
                continue
            kept.append(place)
            counts["truncated_prompts"] += tokens.truncated_prompt
            counts["truncated_responses"] += tokens.truncated_response
            _check_demonstration(tokens, chat)
        return {
            "prompt_ids": [encoded[i].prompt_ids for i in kept],
            "response_ids": [encoded[i].response_ids for i in kept],
            "trained": [encoded[i].trained for i in kept],
            "row": [rows[i] for i in kept],
        }

    tokens = derive(records, encode, TOKENISED_DEMOS, ["demonstrations", chat.fingerprint, loss_on])
    return tokens, _counts("demonstrations", len(records), len(tokens), counts, chat)


def _kept(encoded: list[list[Tokens]], chat: ChatFormat, counts: Counter[str]) -> list[int]:
    """The rows that may be trained on, each seen to keep the law; the others are counted."""
    kept = []
    for place, several in enumerate(encoded):
        problem = next((name for name in PROBLEMS if any(t.problem == name for t in several)), "")
        if problem:
            counts[problem] += 1
            continue
        kept.append(place)
        counts["truncated_prompts"] += several[0].truncated_prompt
        counts["truncated_responses"] += sum(tokens.truncated_response for tokens in several)
        for tokens in several:
            _check_law(tokens, chat)
    return kept


def _check_law(tokens: Tokens, chat: ChatFormat) -> None:
    """One BOS, first; one end of turn, last (none in a cut response that is left open)."""
    _check_bos(tokens.prompt_ids, chat)
    closed = chat.format.close_truncated or not tokens.truncated_response
    assert tokens.response_ids.count(chat.end_of_turn_id) == closed
    assert (tokens.response_ids[-1] == chat.end_of_turn_id) == closed
    assert len(tokens.prompt_ids) + len(tokens.response_ids) <= chat.format.max_length


def _check_demonstration(tokens: Demonstration, chat: ChatFormat) -> None:
    """One BOS, first; the last token is trained, and closes a turn (unless it was cut and left open)."""
    _check_bos(tokens.prompt_ids, chat)
    closes_turns = chat.bos_id == chat.end_of_turn_id
    assert closes_turns or chat.bos_id not in tokens.response_ids
    assert len(tokens.trained) == len(tokens.response_ids)
    assert tokens.trained[0]
    assert tokens.trained[-1]
    closed = chat.format.close_truncated or not tokens.truncated_response
    assert tokens.response_ids[-1] == chat.end_of_turn_id or not closed
    assert len(tokens.prompt_ids) + len(tokens.response_ids) <= chat.format.max_length


def _check_bos(ids: list[int], chat: ChatFormat) -> None:
    """One BOS, first, if the tokenizer has one."""
    if chat.bos_id is not None:
        assert ids[0] == chat.bos_id
        closes_turns = chat.bos_id == chat.end_of_turn_id  # one token with both roles, as GPT-2's
        assert closes_turns or chat.bos_id not in ids[1:]


def _label(label: float | None) -> float:
    return math.nan if label is None else label


def _counts(what: str, given: int, kept: int, counts: Counter[str], chat: ChatFormat) -> dict[str, int]:
    dropped = {problem: counts[problem] for problem in PROBLEMS}
    if not kept:
        reasons = ", ".join(f"{name} {n:,}" for name, n in dropped.items())
        limits = f"max_length={chat.format.max_length}, max_prompt_length={chat.format.max_prompt_length}"
        raise UserError(
            f"none of {given:,} {what} is left after tokenisation: {reasons}; data.format has {limits}"
        )
    cut = {name: counts[name] for name in ("truncated_prompts", "truncated_responses")}
    return {what: given, **dropped, "tokenised": kept, **cut}
