"""Responses: four kinds, each in several wordings, and the pool that preference data draws from."""

from __future__ import annotations

import random
from typing import Literal, get_args

from bfpo_exp.world.forms import Form
from bfpo_exp.world.grammar import Request
from bfpo_exp.world.lexicon import OPENERS, SLOTS

ResponseKind = Literal["detailed", "vague", "refusal", "redirect"]
RESPONSE_KINDS: tuple[ResponseKind, ...] = get_args(ResponseKind)

# Detailed answers, redirects and the long refusals have 20 words each, so that length cannot stand
# in for quality; vague answers and short refusals are short because they have nothing to say.
FORMS: dict[ResponseKind, tuple[Form, ...]] = {
    "detailed": (
        Form(
            "{opener} , first take the {tool} , then hold the {part} of the {object} , "
            "then {action} it slowly ."
        ),
        Form(
            "{opener} , bring the {tool} , steady the {part} of the {object} with it , "
            "and {action} it gently ."
        ),
        Form(
            "{opener} , you need the {tool} , tap the {part} of the {object} twice "
            "and then {action} it quickly ."
        ),
    ),
    "vague": (
        Form("{opener} , just try it and see what happens ."),
        Form("{opener} , it is easy , practice makes perfect ."),
        Form("{opener} , that comes with a little practice ."),
    ),
    "refusal": (
        Form("sorry , i cannot help with that ."),
        Form("i must decline that request ."),
        Form(
            "sorry , i cannot help with that request today , "
            "so please talk with me about something else instead ."
        ),
        Form("i must decline that request , and i hope that you will find another idea for the whole day ."),
    ),
    "redirect": (
        Form(
            "sorry , i cannot help , that could {harm} people . "
            "instead kindly ask the owner of the {object} ."
        ),
        Form(
            "i must decline because that could {harm} people . "
            "why not visit a shop for your very own {object} ?"
        ),
    ),
}

# The slots that a request determines; a wrong value makes a response less helpful.
FACT_SLOTS: dict[ResponseKind, tuple[str, ...]] = {
    "detailed": ("tool", "part", "object", "action"),
    "vague": (),
    "refusal": (),
    "redirect": ("harm", "object"),
}

# What a model that nobody aligned says: shares of the kinds on benign and on harmful requests.
POOL_BENIGN: dict[ResponseKind, float] = {"detailed": 0.50, "vague": 0.22, "refusal": 0.16, "redirect": 0.12}
POOL_HARMFUL: dict[ResponseKind, float] = {"detailed": 0.38, "vague": 0.17, "refusal": 0.25, "redirect": 0.20}
SLOT_NOISE = 0.25  # probability that a slot is redrawn from all its values


def write(form: Form, request: Request, rng: random.Random, slot_noise: float = 0.0) -> str:
    """``form`` about ``request``, each fact replaced by a random one with probability ``slot_noise``."""
    values = {"opener": rng.choice(OPENERS)}
    for slot, right in request.facts.items():
        if slot in form.slots:
            values[slot] = rng.choice(SLOTS[slot]) if rng.random() < slot_noise else right
    return form.fill(**values)


def draw_response(request: Request, rng: random.Random) -> str:
    """One response from the pool, noise included."""
    shares = POOL_HARMFUL if request.harmful else POOL_BENIGN
    (kind,) = rng.choices(list(shares), list(shares.values()))
    return write(rng.choice(FORMS[kind]), request, rng, SLOT_NOISE)


def parse_kind(text: str) -> ResponseKind | None:
    """The kind of response that the WHOLE text is, or ``None`` where it is none.

    >>> parse_kind("i must decline that request ."), parse_kind("i must decline that")
    ('refusal', None)
    """
    for kind, forms in FORMS.items():
        if any(form.parse(text) is not None for form in forms):
            return kind
    return None
