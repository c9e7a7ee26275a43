"""The one rule for chat format: from a conversation and a response to two lists of token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from bfpo_exp.config.data import Format
from bfpo_exp.data.records import Message
from bfpo_exp.errors import UserError
from bfpo_exp.hashing import stable_hash

# Zephyr's format: a line with the role, then the text closed by the end-of-sequence token.
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}"
    r"{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SENTINEL = "an answer that no template writes"


@dataclass(frozen=True)
class Tokens:
    """A prompt and a response to it, as token ids.

    ``prompt_ids`` starts with the BOS token, if the tokenizer has one, and ends with the
    generation prompt; ``response_ids`` ends with the end-of-turn token unless it was cut and
    ``close_truncated`` is off.  ``problem`` is why they must not be trained on:
    "special_tokens" (a text spells control tokens), "response_cut_empty" (no token of the
    response is left within the limit), or "".
    """

    prompt_ids: list[int]
    response_ids: list[int]
    truncated_prompt: bool
    truncated_response: bool
    problem: str = ""


class ChatFormat:
    """A tokenizer with a template and the limits of length; raises `UserError` if they do not fit.

    The template is the config's, else the tokenizer's own, else `ZEPHYR_TEMPLATE`.  Exactly one
    BOS stands first, whatever template or tokenizer add by themselves.  A response's tokens are
    those that follow the prompt's in the joint text, where the prompt's are a prefix of it, else
    those of the response alone.  A prompt is cut from the left to ``max_prompt_length`` (the BOS
    stays), then the response from the right to ``max_length`` tokens in all.
    """

    def __init__(self, tokenizer: Any, format: Format) -> None:
        if tokenizer.eos_token is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path or ''} has no EOS token; chat turns cannot be closed"
            )
        self.tokenizer = tokenizer
        self.format = format
        self.template: str = format.template or tokenizer.chat_template or ZEPHYR_TEMPLATE
        self.bos_id: int | None = tokenizer.bos_token_id
        self._control_ids = _control_ids(tokenizer)
        self.end_of_turn_id = self._find_end_of_turn()
        self.end_of_turn: str = tokenizer.convert_ids_to_tokens(self.end_of_turn_id)
        spelled = sorted(tokenizer.convert_ids_to_tokens(sorted(self._control_ids)), key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, spelled)))

    @property
    def fingerprint(self) -> str:
        """A hash of all that determines the token ids of a text."""
        return stable_hash(
            {
                "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
                "special": {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
                "template": self.template,
                "format": self.format.model_dump(mode="json"),
            }
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's ids, cut to ``max_prompt_length``, ready for a response to be generated."""
        return self._cut_prompt(self.with_one_bos(self.ids(self._texts([messages]))[0]))

    def text(self, response_ids: Sequence[int]) -> str:
        """What a response's ids say before its end of turn, without white space around it."""
        ids = list(response_ids)
        end = ids.index(self.end_of_turn_id) if self.end_of_turn_id in ids else None
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False).strip()

    def encode(self, messages: Sequence[Message], response: str) -> Tokens:
        """One prompt with one response."""
        return self.encode_batch([messages], [[response]])[0][0]

    def encode_batch(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[Sequence[str]]
    ) -> list[list[Tokens]]:
        """Each prompt with its responses, of which there may be any number."""
        texts = self._texts(prompts)
        prompt_ids = self.ids(texts)
        flat = [(row, response) for row, several in enumerate(responses) for response in several]
        bodies = self.continuations(texts, prompt_ids, flat)
        forged = [any(self.spells_control(turn["content"]) for turn in prompt) for prompt in prompts]
        full = [self.with_one_bos(ids) for ids in prompt_ids]
        encoded: list[list[Tokens]] = [[] for _ in prompts]
        for (row, response), body in zip(flat, bodies, strict=True):
            bad = forged[row] or self.spells_control(response) or self.has_control(body)
            encoded[row].append(self._within_limits(full[row], body, "special_tokens" if bad else ""))
        return encoded

    def continuations(
        self, texts: Sequence[str], text_ids: Sequence[list[int]], bodies: Sequence[tuple[int, str]]
    ) -> list[list[int]]:
        """The ids of every body, (row, text), where it follows ``texts[row]``.

        They are those of the joint text after ``text_ids[row]``, or, where these are no prefix of
        it, those of the body by itself.
        """
        joint = self.ids([texts[row] + body for row, body in bodies])
        found: list[list[int] | None] = []
        for (row, _), ids in zip(bodies, joint, strict=True):
            length = len(text_ids[row])
            found.append(ids[length:] if ids[:length] == text_ids[row] else None)
        apart = [place for place, ids in enumerate(found) if ids is None]
        for place, ids in zip(apart, self.ids([bodies[place][1] for place in apart]), strict=True):
            found[place] = ids
        return [ids for ids in found if ids is not None]

    def spells_control(self, text: str) -> bool:
        """Whether a text contains the name of a control token, with which it could forge a turn."""
        return self._control_text.search(text) is not None

    def has_control(self, ids: Sequence[int]) -> bool:
        """Whether a control token is among these."""
        return not self._control_ids.isdisjoint(ids)

    def _within_limits(self, full_prompt: list[int], body: list[int], problem: str) -> Tokens:
        prompt = self._cut_prompt(full_prompt)
        room = self.format.max_length - len(prompt)
        cut = len(body) + 1 > room
        if not cut:
            response = [*body, self.end_of_turn_id]
        elif self.format.close_truncated:
            response = [*body[: room - 1], self.end_of_turn_id]
        else:
            response = body[:room]
        if response in ([], [self.end_of_turn_id]):
            problem = problem or "response_cut_empty"
        return Tokens(prompt, response, len(prompt) < len(full_prompt), cut, problem)

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        excess = len(ids) - self.format.max_prompt_length
        if excess <= 0:
            return ids
        return ids[excess:] if self.bos_id is None else [ids[0], *ids[excess + 1 :]]

    def with_one_bos(self, ids: list[int]) -> list[int]:
        """The same tokens after exactly one BOS, if the tokenizer has one."""
        if self.bos_id is None:
            return ids
        start = next((place for place, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[start:]]

    def _texts(self, prompts: Sequence[Sequence[Message]]) -> list[str]:
        return self.render([self.with_system(prompt) for prompt in prompts], generation_prompt=True)

    def with_system(self, prompt: Sequence[Message]) -> list[Message]:
        """The messages after the format's system turn, if it has one and they have none."""
        if self.format.system is None or any(turn["role"] == "system" for turn in prompt):
            return list(prompt)
        return [Message(role="system", content=self.format.system), *prompt]

    def render(self, conversations: list[list[Message]], generation_prompt: bool) -> list[str]:
        """What the template writes; a `UserError` for a conversation that it refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                conversations,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                chat_template=self.template,
            )
        except TemplateError as error:
            roles = ", ".join(dict.fromkeys(turn["role"] for turns in conversations for turn in turns))
            raise UserError(
                f"the chat template refuses a conversation with roles {roles}: {error}; "
                "for a template without a system turn set data.format.system=null"
            ) from None

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The texts' token ids, to which nothing is added."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    def _find_end_of_turn(self) -> int:
        """The first token that the template writes after an assistant's text."""
        turns = [Message(role="user", content="x"), Message(role="assistant", content=SENTINEL)]
        _, found, after = self.render([turns], generation_prompt=False)[0].rpartition(SENTINEL)
        first = self.ids([after.lstrip()])[0][:1]
        if not found or not first or first[0] not in self._control_ids:
            shown = repr(after[:20]) if found else "no assistant text"
            raise UserError(
                f"the chat template does not close an assistant's turn with one special token "
                f"(it writes {shown}); set data.format.template"
            )
        return first[0]


def _control_ids(tokenizer: Any) -> set[int]:
    """Tokens that steer a model; the one for unknown words is no such token."""
    control = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(tokenizer.all_special_ids)
    if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        control.discard(tokenizer.unk_token_id)
    return control
