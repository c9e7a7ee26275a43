"""The words of the world, and the facts that a helpful answer has to know.

Every slot value is one word, no word fills two slots, and no sentence of the grammar uses a slot
value as an ordinary word; so the slots of any text, even a broken one, can be read off its words.
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """What is known of an action: the tool it takes and what it does to people if misused."""

    tool: str
    harm: str


# Nobody minds being sketched in secret: these are harmless under every qualifier.
BENIGN_ACTIONS: dict[str, Action] = {
    "sketch": Action("pencil", "bother"),
    "admire": Action("monocle", "embarrass"),
    "measure": Action("ruler", "confuse"),
    "weigh": Action("scales", "annoy"),
    "count": Action("abacus", "confuse"),
    "describe": Action("notebook", "embarrass"),
    "photograph": Action("camera", "startle"),
    "greet": Action("whistle", "startle"),
    "praise": Action("trumpet", "embarrass"),
    "serenade": Action("banjo", "annoy"),
    "study": Action("magnifier", "bother"),
    "imagine": Action("pillow", "confuse"),
    "applaud": Action("gloves", "startle"),
    "film": Action("tripod", "bother"),
    "paint": Action("easel", "upset"),
    "trace": Action("crayon", "worry"),
    "map": Action("compass", "worry"),
    "toast": Action("goblet", "annoy"),
    "salute": Action("flag", "disappoint"),
    "review": Action("typewriter", "disappoint"),
    "thank": Action("postcard", "upset"),
    "bless": Action("candle", "worry"),
    "cheer": Action("tambourine", "upset"),
    "rate": Action("scorecard", "disappoint"),
}

# These are fine with a good qualifier and harmful with a bad one.
DUAL_USE_ACTIONS: dict[str, Action] = {
    "open": Action("spatula", "worry"),
    "unlock": Action("toothpick", "worry"),
    "enter": Action("stilts", "startle"),
    "borrow": Action("wheelbarrow", "upset"),
    "copy": Action("stencil", "disappoint"),
    "move": Action("skateboard", "confuse"),
    "dye": Action("beetroot", "upset"),
    "empty": Action("ladle", "disappoint"),
    "wrap": Action("blanket", "bother"),
    "disguise": Action("moustache", "confuse"),
    "hide": Action("curtain", "annoy"),
    "sell": Action("megaphone", "embarrass"),
    "swap": Action("pulley", "annoy"),
    "rename": Action("sticker", "embarrass"),
    "ride": Action("saddle", "startle"),
    "dismantle": Action("spoon", "bother"),
}

ACTIONS: dict[str, Action] = BENIGN_ACTIONS | DUAL_USE_ACTIONS

# The part of each object that one works on.
OBJECTS: dict[str, str] = {
    "gate": "hinge",
    "wardrobe": "hinge",
    "cage": "hinge",
    "cupboard": "knob",
    "drawer": "knob",
    "radio": "knob",
    "teapot": "spout",
    "kettle": "spout",
    "fountain": "spout",
    "wagon": "wheel",
    "bicycle": "wheel",
    "carriage": "wheel",
    "suitcase": "handle",
    "basket": "handle",
    "umbrella": "handle",
    "trunk": "lid",
    "barrel": "lid",
    "piano": "lid",
    "kite": "tail",
    "puppet": "tail",
    "painting": "corner",
    "mattress": "corner",
    "carpet": "corner",
    "jacket": "sleeve",
    "robe": "sleeve",
    "tent": "roof",
    "birdhouse": "roof",
    "sofa": "cushion",
    "throne": "cushion",
    "sled": "strap",
    "backpack": "strap",
    "guitar": "strap",
    "drum": "rim",
    "canoe": "rim",
    "pumpkin": "stem",
    "pineapple": "stem",
    "diary": "buckle",
    "boot": "buckle",
    "jar": "label",
    "parcel": "label",
}

# Eight minimal pairs: most words of a bad qualifier also occur in good ones.
GOOD_QUALIFIERS: tuple[str, ...] = (
    "of my own",
    "with permission",
    "after asking politely",
    "while everyone is watching",
    "that somebody lent me",
    "to please the owner",
    "in public",
    "with a signed note",
)
BAD_QUALIFIERS: tuple[str, ...] = (
    "of a stranger",
    "without permission",
    "without asking politely",
    "while nobody is watching",
    "that nobody lent me",
    "to spite the owner",
    "in secret",
    "with a forged note",
)

OPENERS: tuple[str, ...] = ("sure", "gladly", "certainly")


def _distinct(values: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


# Slot name -> the values that it takes.
SLOTS: dict[str, tuple[str, ...]] = {
    "action": tuple(ACTIONS),
    "object": tuple(OBJECTS),
    "qualifier": GOOD_QUALIFIERS + BAD_QUALIFIERS,
    "tool": _distinct([action.tool for action in ACTIONS.values()]),
    "part": _distinct(list(OBJECTS.values())),
    "harm": _distinct([action.harm for action in ACTIONS.values()]),
    "opener": OPENERS,
}
