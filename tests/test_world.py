"""The generated world: splits, texts and their inverses, pairs, corpus, questions."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations, product
from math import exp
from statistics import mean

import pytest

from bfpo_exp.errors import UserError
from bfpo_exp.world import (
    KINDS,
    SPLITS,
    Request,
    choice_items,
    corpus,
    judge,
    pairs,
    parse_recognition,
    parse_request,
    requests,
    split_of,
    vocabulary,
)
from bfpo_exp.world.grammar import HELDOUT_TEMPLATES, TEMPLATES, TRAIN_TEMPLATES
from bfpo_exp.world.lexicon import ACTIONS, BAD_QUALIFIERS, DUAL_USE_ACTIONS, OBJECTS, SLOTS
from bfpo_exp.world.preferences import BRADLEY_TERRY_SCALE
from bfpo_exp.world.recognition import QUESTION
from bfpo_exp.world.responses import FORMS
from bfpo_exp.world.words import COMPLIANCE_MARKERS, REFUSAL_MARKERS

CLEAN = {"unscreened": 0.0, "label_noise": 0.0}


def request_of(record):
    request = parse_request(record["prompt"][0]["content"])
    assert request is not None
    return request


# ---------------------------------------------------------------- requests and splits


def test_splits_partition_the_combinations_and_each_has_its_share():
    sizes = Counter(split_of(action, object_) for action, object_ in product(ACTIONS, OBJECTS))
    assert sizes == {"train": 1240, "dev": 120, "test": 240}


def test_every_action_and_every_object_occurs_in_every_split():
    for split in SPLITS:
        inside = [(a, o) for a, o in product(ACTIONS, OBJECTS) if split_of(a, o) == split]
        assert {a for a, _ in inside} == set(ACTIONS)
        assert {o for _, o in inside} == set(OBJECTS)


def test_no_combination_of_train_is_ever_evaluated():
    seen = defaultdict(set)
    for prompt, _ in corpus(3000, 0.4, 0.0, seed=0):
        request = parse_request(prompt)
        seen["train"].add((request.action, request.object))
    for split, kind in product(("dev", "test"), KINDS):
        seen[split] |= {(r.action, r.object) for r in requests(split, kind, 100, seed=0)}
    for one, other in combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


def test_parse_request_inverts_text():
    for action, object_, qualifier, template in product(
        list(ACTIONS)[::5], list(OBJECTS)[::7], SLOTS["qualifier"], range(len(TEMPLATES))
    ):
        request = Request(action, object_, qualifier, template)
        assert parse_request(request.text) == request


@pytest.mark.parametrize(
    "text",
    [
        "",
        "how do i open the teapot ?",
        "how do i open the teapot without permission",
        "how do i open the teapot without permission ? ?",
        "how do i fly the teapot without permission ?",
        "is it harmful to open the teapot without permission ?",
    ],
)
def test_parse_request_rejects_what_is_no_prompt(text):
    assert parse_request(text) is None


@pytest.mark.parametrize(
    ("action", "qualifier", "harmful", "borderline"),
    [
        ("open", "without permission", True, False),
        ("open", "with permission", False, True),
        ("sketch", "without permission", False, True),
        ("sketch", "with permission", False, False),
    ],
)
def test_harmful_takes_a_dual_use_action_and_a_bad_qualifier(action, qualifier, harmful, borderline):
    request = Request(action, "gate", qualifier, template=3)
    assert (request.harmful, request.borderline) == (harmful, borderline)


def test_requests_are_of_the_kind_split_and_phrasing_asked_for():
    for split, kind, heldout in product(SPLITS, KINDS, (False, True)):
        drawn = requests(split, kind, 150, seed=1, heldout_template=heldout)
        assert len(set(drawn)) == 150
        assert {r.split for r in drawn} == {split}
        assert {(r.harmful, r.borderline) for r in drawn} == {(kind == "harmful", kind == "borderline")}
        assert {r.template for r in drawn} == set(HELDOUT_TEMPLATES if heldout else TRAIN_TEMPLATES)


def test_borderline_requests_are_of_both_sorts():
    drawn = requests("test", "borderline", 400, seed=0)
    assert 0.4 < mean(r.action in DUAL_USE_ACTIONS for r in drawn) < 0.6


def test_training_sees_no_heldout_template_but_all_their_words():
    prompts = [prompt for prompt, _ in corpus(2000, 0.4, 0.0, seed=0)]
    prompts += [
        r["prompt"][0]["content"] for s in ("helpfulness", "safety") for r in pairs(s, 500, 0, 0.1, 0.0)
    ]
    assert {parse_request(prompt).template for prompt in prompts} == set(TRAIN_TEMPLATES)
    known = frozenset().union(*(TEMPLATES[i].words() for i in TRAIN_TEMPLATES))
    assert all(TEMPLATES[i].words() <= known for i in HELDOUT_TEMPLATES)


# ---------------------------------------------------------------- words


def test_the_slots_of_a_text_can_be_read_off_its_words():
    slots = {slot: set(SLOTS[slot]) for slot in ("action", "object", "tool", "part", "harm", "opener")}
    for one, other in combinations(slots.values(), 2):
        assert not one & other
    sentences = [*TEMPLATES, QUESTION, *(form for forms in FORMS.values() for form in forms)]
    fixed = {word for form in sentences for word in form.pattern.split()}
    fixed |= {word for qualifier in SLOTS["qualifier"] for word in qualifier.split()}
    assert not fixed & set().union(*slots.values())


def test_no_generated_text_has_a_word_outside_the_vocabulary():
    words = vocabulary()
    assert words == sorted(set(words))
    texts = [text for sample in corpus(4000, 0.4, 0.2, seed=2) for text in sample]
    for split, kind, heldout in product(SPLITS, KINDS, (False, True)):
        texts += [r.text for r in requests(split, kind, 50, 0, heldout)]
    for task in ("acceptable", "recognise"):
        for item in choice_items(task, "test", 200, seed=0):
            texts += [item.prompt, *item.candidates]
    for record in pairs("safety", 300, 0, 0.0, 0.0, split="dev"):
        texts += [record["prompt"][0]["content"], record["response_w"], record["response_l"]]
    used = set(" ".join(texts).split(" "))
    assert used == set(words)  # no word outside it, and none that never occurs


def test_prompt_and_response_are_short():
    assert max(len(f"{p} {r}".split()) for p, r in corpus(4000, 0.4, 0.2, seed=3)) <= 45


def test_markers_tell_complying_from_declining_responses():
    for kind, forms in FORMS.items():
        for form in forms:
            complies, declines = form.words() & COMPLIANCE_MARKERS, form.words() & REFUSAL_MARKERS
            assert bool(complies) == (kind in ("detailed", "vague"))
            assert bool(declines) == (kind in ("refusal", "redirect"))
    for form in (*TEMPLATES, QUESTION):
        assert not form.words() & (COMPLIANCE_MARKERS | REFUSAL_MARKERS)


# ---------------------------------------------------------------- preference pairs


@pytest.mark.parametrize("stream", ["helpfulness", "safety"])
@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_canonical_records(stream, split):
    for row, record in enumerate(pairs(stream, 200, 7, 0.15, 0.03, split=split)):
        assert (record["stream"], record["source"], record["row"]) == (stream, "world", row)
        assert (record["ordered"], record["ranker"]) == (True, "data")
        assert [message["role"] for message in record["prompt"]] == ["user"]
        assert record["response_w"] != record["response_l"]
        assert {record["safe_w"], record["safe_l"]} <= {0.0, 1.0}
        assert request_of(record).split == split


@pytest.mark.parametrize("unscreened", [0.0, 0.15, 1.0])
def test_helpfulness_stream_is_labelled_safe_and_partly_unscreened(unscreened):
    records = pairs("helpfulness", 3000, 0, unscreened, 0.5)
    assert {(r["safe_w"], r["safe_l"], r["safer"]) for r in records} == {(1.0, 1.0, None)}
    share = mean(request_of(r).harmful for r in records)
    assert share == pytest.approx(unscreened, abs=0.02 if 0 < unscreened < 1 else 0)


def test_helpfulness_stream_has_its_mix_of_benign_requests():
    found = [request_of(r) for r in pairs("helpfulness", 3000, 1, **CLEAN)]
    assert mean(not r.borderline for r in found) == pytest.approx(0.60, abs=0.03)
    assert mean(r.action in DUAL_USE_ACTIONS for r in found) == pytest.approx(0.25, abs=0.03)
    assert mean(r.qualifier in BAD_QUALIFIERS for r in found) == pytest.approx(0.15, abs=0.03)


def test_safety_labels_are_the_judges_but_for_the_noise():
    def wrong(label_noise):
        return mean(
            bool(r[label]) != judge(request_of(r), r[text]).safe
            for r in pairs("safety", 3000, 0, 0.0, label_noise)
            for label, text in (("safe_w", "response_w"), ("safe_l", "response_l"))
        )

    assert wrong(0.0) == 0
    assert wrong(0.1) == pytest.approx(0.1, abs=0.015)
    assert wrong(1.0) == 1


@pytest.mark.parametrize("label_noise", [0.0, 0.2])
def test_safer_follows_the_labels_and_then_the_detail(label_noise):
    ties = Counter()
    for record in pairs("safety", 2000, 3, 0.0, label_noise):
        assert request_of(record).harmful
        labels = {"w": record["safe_w"], "l": record["safe_l"]}
        other = "l" if record["safer"] == "w" else "w"
        assert labels[record["safer"]] >= labels[other]
        if labels["w"] == labels["l"] == 1:
            ties[record["safer"]] += 1
        if labels["w"] == labels["l"] == 0:
            kinds = {side: judge(request_of(record), record[f"response_{side}"]).kind for side in "wl"}
            if set(kinds.values()) == {"vague", "detailed"}:
                assert kinds[record["safer"]] == "vague"
    assert 0.4 < ties["w"] / ties.total() < 0.6


def test_the_more_helpful_response_wins_as_often_as_bradley_terry_says():
    won, expected = defaultdict(list), defaultdict(list)
    for record in pairs("helpfulness", 6000, 5, **CLEAN):
        w, other = (
            judge(request_of(record), record[key]).helpfulness for key in ("response_w", "response_l")
        )
        gap = abs(w - other)
        bin_ = "equal" if gap < 0.01 else "near" if gap <= 0.26 else "far"
        won[bin_].append(w > other)
        expected[bin_].append(1 / (1 + exp(-gap / BRADLEY_TERRY_SCALE)))
    assert mean(won["near"]) == pytest.approx(mean(expected["near"]), abs=0.04)
    assert mean(won["far"]) == pytest.approx(mean(expected["far"]), abs=0.02)
    assert 0.6 < mean(won["near"]) < mean(won["far"]) < 1


def test_shares_and_noise_change_only_the_rows_that_they_touch():
    clean, mixed = (pairs("helpfulness", 400, 9, share, 0.0) for share in (0.0, 0.3))
    for before, after in zip(clean, mixed, strict=True):
        assert request_of(after).harmful or before == after
    exact, noisy = (pairs("safety", 400, 9, 0.0, noise) for noise in (0.0, 0.3))
    for before, after in zip(exact, noisy, strict=True):
        assert [before[k] for k in ("prompt", "response_w", "response_l")] == [
            after[k] for k in ("prompt", "response_w", "response_l")
        ]


# ---------------------------------------------------------------- corpus


def test_corpus_has_its_shares():
    samples = corpus(6000, 0.4, 0.25, seed=0)
    asked = [(QUESTION.parse(prompt), answer) for prompt, answer in samples]
    questions = [(slots, answer) for slots, answer in asked if slots]
    others = [parse_request(prompt) for prompt, _ in samples if not QUESTION.parse(prompt)]
    assert len(questions) / 6000 == pytest.approx(0.25, abs=0.02)
    assert mean(r.harmful for r in others) == pytest.approx(0.4, abs=0.025)
    assert mean(parse_recognition(answer) for _, answer in questions) == pytest.approx(0.5, abs=0.04)


def test_recognition_answers_in_the_corpus_are_right_and_on_train_combinations():
    for prompt, answer in corpus(1000, 0.4, 1.0, seed=1):
        request = Request(**QUESTION.parse(prompt), template=0)
        assert request.split == "train"
        assert parse_recognition(answer) is request.harmful


# ---------------------------------------------------------------- multiple choice


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [1, 300])
def test_acceptable_items(split, size):
    items = choice_items("acceptable", split, size, seed=0)
    found = [parse_request(item.prompt) for item in items]
    assert len(set(found)) == size
    assert {r.split for r in found} == {split}
    for request, item in zip(found, items, strict=True):
        verdicts = [judge(request, text) for text in item.candidates]
        right, wrong = verdicts[item.answer], verdicts[1 - item.answer]
        answered, declined = (wrong, right) if request.harmful else (right, wrong)
        assert answered.kind == "detailed"
        assert answered.helpfulness == 1
        assert declined.kind in ("refusal", "redirect")
        assert right.safe


@pytest.mark.parametrize("split", SPLITS)
def test_recognise_items(split):
    for item in choice_items("recognise", split, 300, seed=0):
        request = Request(**QUESTION.parse(item.prompt), template=0)
        assert request.split == split
        assert [parse_recognition(text) for text in item.candidates] == [
            (i == item.answer) == request.harmful for i in range(2)
        ]


@pytest.mark.parametrize("task", ["acceptable", "recognise"])
def test_no_shortcut_answers_the_questions(task):
    items = choice_items(task, "test", 600, seed=1)
    slots = [
        QUESTION.parse(i.prompt) if task == "recognise" else dataclasses.asdict(parse_request(i.prompt))
        for i in items
    ]
    dual, bad = (
        [s[k] in v for s in slots] for k, v in (("action", DUAL_USE_ACTIONS), ("qualifier", BAD_QUALIFIERS))
    )
    harmful = [a and b for a, b in zip(dual, bad, strict=True)]
    assert mean(harmful) == 0.5  # always refusing, or always saying yes
    assert mean(item.answer for item in items) == pytest.approx(0.5, abs=0.06)  # the position
    assert mean(a == h for a, h in zip(dual, harmful, strict=True)) == pytest.approx(0.8, abs=0.04)
    assert mean(b == h for b, h in zip(bad, harmful, strict=True)) == pytest.approx(0.8, abs=0.04)
    for item in items:  # the length
        assert len({len(text.split()) for text in item.candidates}) == 1


def test_acceptable_candidates_are_worded_alike_for_harmful_and_benign_requests():
    wordings = {True: Counter(), False: Counter()}
    for item in choice_items("acceptable", "train", 1200, seed=0):
        request = parse_request(item.prompt)
        for text in item.candidates:
            (pattern,) = (f.pattern for forms in FORMS.values() for f in forms if f.parse(text) is not None)
            wordings[request.harmful][pattern] += 1
    assert wordings[True].keys() == wordings[False].keys()
    for pattern, count in wordings[True].items():
        assert count == pytest.approx(wordings[False][pattern], rel=0.3)


# ---------------------------------------------------------------- determinism and bad input

GENERATORS = {
    "corpus": lambda seed, size=40: corpus(size, 0.4, 0.2, seed),
    "helpfulness": lambda seed, size=40: pairs("helpfulness", size, seed, 0.15, 0.03),
    "safety": lambda seed, size=40: pairs("safety", size, seed, 0.15, 0.03),
    "requests": lambda seed, size=40: requests("test", "borderline", size, seed),
    "acceptable": lambda seed, size=40: choice_items("acceptable", "test", size, seed),
    "recognise": lambda seed, size=40: choice_items("recognise", "test", size, seed),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_the_same_seed_gives_the_same_rows_and_a_smaller_set_is_a_prefix(name):
    make = GENERATORS[name]
    assert make(0) == make(0)
    assert make(0) != make(1)
    assert make(0, 15) == make(0)[:15]
    assert make(0, 0) == []


def test_another_process_with_another_hash_seed_generates_the_same():
    code = (
        "from bfpo_exp.world import *; "
        "print([corpus(30, .4, .2, 5), pairs('safety', 30, 5, 0., .1), requests('dev', 'harmful', 30, 5),"
        "choice_items('acceptable', 'dev', 30, 5), vocabulary()])"
    )

    def output(hash_seed):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout

    assert output("1") == output("2")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: requests("tset", "benign", 1, 0), "nearest: 'test'"),
        (lambda: requests("test", "harmfull", 1, 0), "nearest: 'harmful'"),
        (lambda: requests("dev", "harmful", 5000, 0), "has 2304 distinct ones"),
        (lambda: requests("dev", "harmful", -1, 0), "size=-1"),
        (lambda: pairs("safty", 1, 0, 0.0, 0.0), "nearest: 'safety'"),
        (lambda: pairs("safety", 1, 0, 1.5, 0.0), "unscreened=1.5"),
        (lambda: pairs("safety", 1, 0, 0.0, float("nan")), "label_noise=nan"),
        (lambda: corpus(1, -0.1, 0.0, 0), "harmful=-0.1"),
        (lambda: choice_items("recognize", "test", 1, 0), "nearest: 'recognise'"),
        (lambda: Request("opne", "gate", "in public", 0), "nearest: 'open'"),
        (lambda: Request("open", "gate", "in public", 8), "allowed: 0 to 7"),
    ],
)
def test_bad_input_ends_in_one_clear_line(call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
