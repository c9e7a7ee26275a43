"""Conversations of many turns: which tokens are trained, and the laws of their ids."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from data_support import bpe_tokenizer, chat_format, runs_root  # noqa: F401
from datasets import Dataset
from test_data_chat import CHATML, SETTINGS, made, text_of, user

from bfpo_exp.config.training import LossOn
from bfpo_exp.data.arrow import DEMO_FEATURES
from bfpo_exp.data.chat import ChatFormat
from bfpo_exp.data.conversations import Demonstration, encode_demonstrations, sft_format
from bfpo_exp.data.records import Message
from bfpo_exp.data.tokenise import tokenise_demos
from bfpo_exp.errors import UserError

# A template that sets the assistant's text apart by blanks, and has no turn of the system's.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


CONVERSATION = [
    user("open the door"),
    assistant("how?"),
    user("take the key"),
    assistant("I do."),
    user("so?"),
]
RESPONSE = "the door is open"


def encode(
    chat: ChatFormat,
    loss_on: LossOn,
    prompt: list[Message] = CONVERSATION,
    response: str = RESPONSE,
) -> Demonstration:
    (only,) = encode_demonstrations(chat, [prompt], [response], loss_on)
    return only


def ids_of(demo: Demonstration) -> list[int]:
    return demo.prompt_ids + demo.response_ids


def trained_texts(chat: ChatFormat, demo: Demonstration) -> list[str]:
    """The text of every run of trained tokens."""
    flags = [False] * len(demo.prompt_ids) + demo.trained
    runs = groupby(zip(flags, ids_of(demo), strict=True), key=lambda pair: pair[0])
    return [text_of(chat, [token for _, token in run]) for trained, run in runs if trained]


# ---------------------------------------------------------------- what is trained


def test_every_turn_of_the_assistants_with_its_end_and_nothing_else() -> None:
    chat = made()
    demo = encode(chat, "assistant")
    assert text_of(chat, ids_of(demo)) == (
        "<s><|system|>\n</s>\n<|user|>\nopen the door</s>\n<|assistant|>\nhow?</s>\n"
        "<|user|>\ntake the key</s>\n<|assistant|>\nI do.</s>\n"
        "<|user|>\nso?</s>\n<|assistant|>\nthe door is open</s>"
    )
    assert trained_texts(chat, demo) == ["how?</s>", "I do.</s>", "the door is open</s>"]
    assert (demo.trained[0], demo.trained[-1]) == (True, True)
    assert text_of(chat, demo.prompt_ids).endswith("open the door</s>\n<|assistant|>\n")


def test_the_last_response_is_what_the_chat_format_says() -> None:
    chat = made()
    tokens, demo = chat.encode(CONVERSATION, RESPONSE), encode(chat, "last")
    assert (demo.prompt_ids, demo.response_ids) == (tokens.prompt_ids, tokens.response_ids)
    assert demo.trained == [True] * len(tokens.response_ids)


def test_all_tokens_but_the_first() -> None:
    chat = made()
    demo = encode(chat, "all")
    assert ids_of(demo) == ids_of(encode(chat, "assistant"))
    assert demo.prompt_ids == [chat.bos_id]
    assert all(demo.trained)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("system", ["", "be kind", None])
def test_laws_of_every_format(name: str, system: str | None) -> None:
    """One BOS; what stands before a turn is what it is generated after; each turn ends once."""
    chat = made(**SETTINGS[name], changes={"system": system})
    demo = encode(chat, "assistant")
    ids = ids_of(demo)
    if chat.bos_id is not None:
        assert [place for place, token in enumerate(ids) if token == chat.bos_id] == [0]
    flags = [False] * len(demo.prompt_ids) + demo.trained
    starts = [i for i in range(1, len(ids)) if flags[i] and not flags[i - 1]]
    whole = [*CONVERSATION, assistant(RESPONSE)]
    assert [ids[:start] for start in starts] == [chat.prompt_ids(whole[:turn]) for turn in (1, 3, 5)]
    close = chat.end_of_turn
    assert trained_texts(chat, demo) == [f"how?{close}", f"I do.{close}", f"the door is open{close}"]
    assert ids == ids_of(encode(chat, "last"))


def test_one_turn_is_the_same_whichever_turns_are_trained() -> None:
    for settings in SETTINGS.values():
        chat = made(**settings)
        assert encode(chat, "assistant", [user("open")]) == encode(chat, "last", [user("open")])


def test_a_template_that_writes_blanks_around_a_text() -> None:
    """The blanks belong to the turn, as they do in the history of a later one."""
    chat = made(LLAMA2, {"system": None})
    demo = encode(chat, "assistant", [user("open"), assistant("how?"), user("so?")], "done")
    assert trained_texts(chat, demo) == [" how? </s>", " done </s>"]


def test_a_text_that_spells_a_role_is_no_turn() -> None:
    chat = made()
    prompt = [user("<|assistant|>\nfoo"), assistant("how? <|user|>"), user("<|assistant|>\n")]
    assert trained_texts(chat, encode(chat, "assistant", prompt, "yes")) == ["how? <|user|></s>", "yes</s>"]


def test_a_turn_without_a_text_is_not_trained() -> None:
    chat = made()
    demo = encode(chat, "assistant", [user("open"), assistant(""), user("so?")], "yes")
    assert trained_texts(chat, demo) == ["yes</s>"]
    nothing_after = encode(chat, "assistant", [user("open"), assistant("yes"), user("so?")], "")
    assert trained_texts(chat, nothing_after) == ["yes</s>"]
    assert nothing_after.response_ids[-1] == chat.end_of_turn_id
    assert encode(chat, "assistant", [user("open")], "").problem == "response_cut_empty"


@pytest.mark.parametrize("place", range(6))
def test_texts_cannot_forge_turns(place: int) -> None:
    whole = [*CONVERSATION, assistant(RESPONSE)]
    whole[place] = Message(role=whole[place]["role"], content="a</s>\n<|assistant|>\nb")
    for loss_on in ("last", "assistant", "all"):
        demo = encode(made(), loss_on, whole[:-1], whole[-1]["content"])  # type: ignore[arg-type]
        assert demo.problem == "special_tokens"


def test_turns_that_merge_with_the_text_before_them() -> None:
    """As for one response: the prompt's tokens stay its own, and the turn is tokenised by itself."""
    merging = (
        "{% for m in messages %}{{ 'the do' + m['content'] + eos_token }}{% endfor %}"
        "{{ 'the do' if add_generation_prompt }}"
    )
    chat = made(merging, {"system": None})
    before, joint = chat.ids(["the dox</s>the do", "the dox</s>the door"])
    assert joint[: len(before)] != before  # the case is real
    demo = encode(chat, "assistant", [user("x"), assistant("or"), user("y")], "or")
    assert demo.prompt_ids == [chat.bos_id, *before]
    assert trained_texts(chat, demo) == ["or</s>", "or</s>"]


def test_a_template_that_rewrites_its_history_is_refused() -> None:
    forgetful = (
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last or m['role'] == 'user' "
        "else 'gone') + eos_token }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    chat = made(forgetful, {"system": None})
    assert trained_texts(chat, encode(chat, "assistant", [user("x")], "y")) == ["y</s>"]
    with pytest.raises(UserError, match=r"otherwise than it is generated.*train\.sft\.loss_on=last"):
        encode(chat, "assistant", [user("x"), assistant("a"), user("y")], "z")


# ---------------------------------------------------------------- length


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
@pytest.mark.parametrize("close", [True, False])
def test_a_conversation_is_cut_after_the_last_token_of_the_assistants_that_fits(
    loss_on: LossOn, close: bool
) -> None:
    whole = encode(made(), "assistant")
    ids, flags = ids_of(whole), [False] * len(whole.prompt_ids) + whole.trained
    end = made().end_of_turn_id
    for limit in range(20, len(ids) + 2):
        chat = made(changes={"max_length": limit, "max_prompt_length": 19, "close_truncated": close})
        demo = encode(chat, loss_on)
        assert demo.truncated_response == (limit < len(ids))
        # Tokens that fit, by hand: the last assistant's text token within the limit, and its end.
        text = [i for i in range(len(ids)) if flags[i] and ids[i] != end]
        room = limit if not close else limit - 1
        last = max((i for i in text if i < room), default=None)
        if last is None:
            assert demo.problem == "response_cut_empty"
            continue
        whole_turn = ids[last + 1] == end
        expected = [*ids[: last + 1], *([end] if close or (whole_turn and last + 1 < limit) else [])]
        assert ids_of(demo) == expected
        assert len(expected) <= limit


def test_the_limit_of_demonstrations_may_be_their_own() -> None:
    format = chat_format(max_length=64, max_prompt_length=32)
    assert sft_format(format, None) == format
    assert sft_format(format, 2048) == chat_format(max_length=2048, max_prompt_length=32)
    with pytest.raises(UserError, match=r"train\.sft\.max_length=32 leaves no room.*max_prompt_length=32"):
        sft_format(format, 32)


# ---------------------------------------------------------------- tables


def demo(response: str = RESPONSE, prompt: list[Message] = CONVERSATION) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "source": "s", "row": 3}


@pytest.mark.parametrize("loss_on", ["last", "assistant", "all"])
def test_the_table_holds_what_is_encoded(loss_on: LossOn, runs_root: object) -> None:  # noqa: F811
    long = [user("open"), assistant("take the key " * 40), user("so?")]
    records = [demo(), demo("</s>"), demo(prompt=long), demo(prompt=[user("x")])]
    chat = ChatFormat(bpe_tokenizer(), chat_format(max_length=160, max_prompt_length=130))
    tokens, counts = tokenise_demos(Dataset.from_list(records, features=DEMO_FEATURES), chat, loss_on)
    assert counts["demonstrations"] == 4
    assert counts["special_tokens"] == 1
    assert counts["tokenised"] == 3
    cut_on_the_left = loss_on == "last"
    assert counts["truncated_prompts"] == cut_on_the_left
    assert counts["truncated_responses"] == (not cut_on_the_left)
    for row in tokens:
        record = records[row["row"]]
        expected = encode(chat, loss_on, record["prompt"], record["response"])
        assert (row["prompt_ids"], row["response_ids"]) == (expected.prompt_ids, expected.response_ids)
        assert row["trained"] == expected.trained


def test_one_call_of_the_tokenizer_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one by one, and rows together, have the same ids."""
    chat = made(CHATML, special=("<|im_start|>", "<|im_end|>"))
    rows = [(CONVERSATION, RESPONSE), ([user("x")], "y"), ([user("a</s>")], "b"), (CONVERSATION, "z")]
    alone = [encode(chat, "assistant", prompt, response) for prompt, response in rows]
    calls = []
    ids = chat.ids
    monkeypatch.setattr(chat, "ids", lambda texts: calls.append(len(texts)) or ids(texts))
    together = encode_demonstrations(chat, [prompt for prompt, _ in rows], [r for _, r in rows], "assistant")
    assert together == alone
    assert len(calls) == 3  # what stands before turns, the same with the turns, and what merged: nothing
