"""Demonstrations as token ids, and which of their tokens are trained.

Where a turn of the assistant begins and ends is known from the chat template: it begins where the
template's prompt for it ends, and ends with the end of turn that the template writes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from bfpo_exp.config.data import Format
from bfpo_exp.config.training import LossOn
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.records import Message
from bfpo_exp.errors import UserError


@dataclass(frozen=True)
class Demonstration:
    """A conversation as token ids.

    Attributes:
        prompt_ids: what stands before the first trained token; at least one token, since the first
            one is predicted by nothing.
        response_ids: the rest, which ends with the last trained token.
        trained: of each token of the rest, whether it is trained.
        truncated_prompt, truncated_response: whether tokens were cut off on the left, on the right.
        problem: why it must not be trained on, as in `chat.Tokens`; then the ids mean nothing.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    trained: list[bool]
    truncated_prompt: bool = False
    truncated_response: bool = False
    problem: str = ""


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant: what the template writes before it since the turn before, and its text.

    ``before`` begins with the end of that turn, except for the first.
    """

    before: str
    body: str


def sft_format(format: Format, max_length: int | None) -> Format:
    """The chat format of demonstrations: with a limit of length of their own, if they have one.

    Raises `UserError` if the prompt's limit leaves no room for a response.
    """
    if max_length is None:
        return format
    if max_length <= format.max_prompt_length:
        raise UserError(
            f"train.sft.max_length={max_length} leaves no room for a response after a prompt of "
            f"data.format.max_prompt_length={format.max_prompt_length} tokens; raise it, or lower the other"
        )
    return format.model_copy(update={"max_length": max_length})


def encode_demonstrations(
    chat: ChatFormat, prompts: Sequence[Sequence[Message]], responses: Sequence[str], loss_on: LossOn
) -> list[Demonstration]:
    """Conversations, each a prompt with the response that ends it.

    ``loss_on`` says what is trained:

    - "last": the response, with its end of turn.  Lengths are limited as those of pairs: the prompt
      is cut from the left, then the response from the right.
    - "assistant": every turn of the assistant that has a text, with its end of turn.
    - "all": every token after the first, those of the other turns and of the template included.

    With the last two a conversation is cut from the right to ``max_length`` tokens, and ends with
    the last token of the assistant's that this leaves.

    Raises `UserError` for a template that writes a turn of the history otherwise than it would be
    generated: not after the template's own prompt for it, or without its text.
    """
    if loss_on == "last":
        encoded = chat.encode_batch(prompts, [[response] for response in responses])
        return [
            Demonstration(
                tokens.prompt_ids,
                tokens.response_ids,
                [True] * len(tokens.response_ids),
                tokens.truncated_prompt,
                tokens.truncated_response,
                tokens.problem,
            )
            for (tokens,) in encoded
        ]
    conversations = [
        chat.with_system([*prompt, Message(role="assistant", content=response)])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    forged = [any(chat.spells_control(turn["content"]) for turn in turns) for turns in conversations]
    # A forged end of turn could pass for the template's own, so such a conversation is not looked at.
    turns = [[] if bad else _turns(chat, c) for c, bad in zip(conversations, forged, strict=True)]
    flat = [turn for several in turns for turn in several]
    befores = chat.ids([turn.before for turn in flat])
    bodies = chat.continuations([t.before for t in flat], befores, [(i, t.body) for i, t in enumerate(flat)])
    ends = [0, *accumulate(map(len, turns))]
    return [
        Demonstration([], [], [], problem="special_tokens")
        if bad or any(map(chat.has_control, bodies[start:end]))
        else _joined(chat, befores[start:end], bodies[start:end], loss_on)
        for bad, start, end in zip(forged, ends, ends[1:], strict=False)
    ]


def _turns(chat: ChatFormat, conversation: list[Message]) -> list[_Turn]:
    """The assistant's turns of a conversation in which no text spells a control token."""
    whole = chat.render([conversation], generation_prompt=False)[0]
    places = [place for place, turn in enumerate(conversation) if turn["role"] == "assistant"]
    prompts = chat.render([conversation[:place] for place in places], generation_prompt=True)
    turns, end = [], 0
    for prompt, place in zip(prompts, places, strict=True):
        start, stop = len(prompt), whole.find(chat.end_of_turn, len(prompt))
        found = stop >= 0 and conversation[place]["content"].strip() in whole[start:stop]
        if not found or start < end or not whole.startswith(prompt):
            raise UserError(
                "the chat template writes an assistant's turn of the history otherwise than it is generated, "
                "so not every turn can be trained; set train.sft.loss_on=last"
            )
        turns.append(_Turn(whole[end:start], whole[start:stop]))
        end = stop
    return turns


def _joined(
    chat: ChatFormat, befores: list[list[int]], bodies: list[list[int]], loss_on: LossOn
) -> Demonstration:
    """One conversation from the ids of its assistant's turns, within the limit of length."""
    ids: list[int] = []
    trained: list[bool] = []
    cut = False
    for before, body in zip(befores, bodies, strict=True):
        # The end of the turn before, with which this one begins, is there already.
        before = before[1:] if ids else chat.with_one_bos(before)
        room = chat.format.max_length - len(ids) - len(before)
        cut = len(body) + 1 > room
        kept = body[: max(0, room - 1 if chat.format.close_truncated else room)] if cut else body
        if cut and not kept:
            break
        closed = not cut or chat.format.close_truncated
        ids += [*before, *kept, *[chat.end_of_turn_id] * closed]
        trained += [False] * len(before) + [bool(body)] * (len(kept) + closed)
        if cut:
            break
    if not any(trained):
        return Demonstration([], [], [], truncated_response=cut, problem="response_cut_empty")
    if loss_on == "all":
        trained = [True] * len(ids)
    else:
        length = len(trained) - trained[::-1].index(True)  # nothing follows a last turn without a text
        ids, trained = ids[:length], trained[:length]
    first = max(1, trained.index(True))
    return Demonstration(ids[:first], ids[first:], trained[first:], truncated_response=cut)
