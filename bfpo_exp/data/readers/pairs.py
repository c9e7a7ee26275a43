"""The published preference data sets, one function per schema."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from bfpo_exp.config.data import Source
from bfpo_exp.config.types import Strict
from bfpo_exp.data.readers.base import Index, NoOptions, PairReading, RowReader, read_options
from bfpo_exp.data.readers.rows import Row, SchemaError
from bfpo_exp.data.records import Message

INDEX: tuple[Index | None, ...] = (0, 1, None)
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLE_OF = {"Human": "user", "Assistant": "assistant"}


class Preference(Strict):
    """What 'chosen' means: a helpfulness order, or only that it is the safer response."""

    preference: Literal["helpfulness", "safety"] = Field(
        description="what 'chosen' was chosen for: helpfulness or safety"
    )


def orders(preference: Preference) -> tuple[Index | None, Index | None]:
    """Index of the more helpful and of the safer response in (chosen, rejected), where it is known."""
    return (0, None) if preference.preference == "helpfulness" else (None, 0)


def pku_saferlhf(name: str, source: Source) -> RowReader[PairReading]:
    """PKU-SafeRLHF: two responses, a safety label each, the more helpful and the safer one's id."""
    read_options(NoOptions, name, source)

    def read(row: Row) -> PairReading:
        return PairReading(
            prompt=row.prompt("prompt"),
            responses=(row.text("response_0"), row.text("response_1")),
            better=row.choice("better_response_id", INDEX),
            safe=(row.safety("is_response_0_safe"), row.safety("is_response_1_safe")),
            safer=row.choice("safer_response_id", INDEX),
        )

    return RowReader(
        read,
        required=(
            "prompt",
            "response_0",
            "response_1",
            "is_response_0_safe",
            "is_response_1_safe",
            "better_response_id",
            "safer_response_id",
        ),
    )


def ultrafeedback(name: str, source: Source) -> RowReader[PairReading]:
    """UltraFeedback binarized: chosen and rejected as messages; equal scores are a tie."""
    read_options(NoOptions, name, source)

    def read(row: Row) -> PairReading:
        prompt, chosen = row.answered("chosen")
        other, rejected = row.answered("rejected")
        scores = row.number("score_chosen"), row.number("score_rejected")
        tie = scores[0] is not None and scores[0] == scores[1]
        dirt = "tie" if tie else "prompt_mismatch" if prompt != other else ""
        return PairReading(prompt, (chosen, rejected), better=0, dirt=dirt)

    return RowReader(read, required=("chosen", "rejected"), optional=("score_chosen", "score_rejected"))


def transcript(column: str, text: str) -> tuple[list[Message], str]:
    r"""The turns of a transcript before the last assistant turn, and that turn's text.

    >>> transcript("chosen", "\n\nHuman: Hi\n\nAssistant: Hello")
    ([{'role': 'user', 'content': 'Hi'}], 'Hello')
    """
    before, *parts = TURN.split(text)
    turns = [
        Message(role=ROLE_OF[speaker], content=said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    expected = "a transcript of '\\n\\nHuman: ' and '\\n\\nAssistant: ' turns that ends with the assistant's"
    if before.strip() or len(turns) < 2:
        raise SchemaError(column, f"text with {len(turns)} turns", expected)
    if turns[-1]["role"] != "assistant":
        raise SchemaError(column, "a last turn of the human", expected)
    return turns[:-1], turns[-1]["content"]


def hh_rlhf(name: str, source: Source) -> RowReader[PairReading]:
    """HH-RLHF transcripts.  Those of the harmless splits were chosen as the less harmful of two,

    which is no helpfulness order: ``options.preference=safety`` there, ``helpfulness`` for the
    helpful splits.
    """
    better, safer = orders(read_options(Preference, name, source))

    def read(row: Row) -> PairReading:
        prompt, chosen = transcript("chosen", row.text("chosen"))
        other, rejected = transcript("rejected", row.text("rejected"))
        dirt = "" if prompt == other else "prompt_mismatch"
        return PairReading(prompt, (chosen, rejected), better=better, safer=safer, dirt=dirt)

    return RowReader(read, required=("chosen", "rejected"))


def red_team(name: str, source: Source) -> RowReader[PairReading]:
    """The paper's red-teaming pairs: ``better_modelout`` is 1 or 2, the more helpful output."""
    read_options(NoOptions, name, source)

    def read(row: Row) -> PairReading:
        return PairReading(
            prompt=row.prompt("prompt"),
            responses=(row.text("modeloutput1"), row.text("modeloutput2")),
            better=0 if row.choice("better_modelout", (1, 2)) == 1 else 1,
            safe=(row.safety("is_modelout1_safe"), row.safety("is_modelout2_safe")),
        )

    return RowReader(
        read,
        required=(
            "prompt",
            "modeloutput1",
            "modeloutput2",
            "is_modelout1_safe",
            "is_modelout2_safe",
            "better_modelout",
        ),
    )
