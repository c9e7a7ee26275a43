"""Rewards: combined by hand, by the world's judge, and by classifiers with heads of any name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_support import bpe_tokenizer
from pydantic import TypeAdapter
from reward_support import write_classifier

from bfpo_exp import world
from bfpo_exp.config.rewards import Combine, Head, Heads
from bfpo_exp.data.records import Message
from bfpo_exp.distributed import Group
from bfpo_exp.errors import UserError
from bfpo_exp.rewards.classifier import classifier_scorer, load_classifier, rewarded
from bfpo_exp.rewards.combine import combined, fitted_weights
from bfpo_exp.rewards.judge import judge_rewards
from bfpo_exp.rewards.scorer import finite, shared_out

HELPFULNESS, SAFETY = [1.0, 0.5, 0.2, 0.8], [0.1, 0.5, 1.0, 0.9]


def user(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


# ---------------------------------------------------------------- how they become one


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"rule": "linear", "weights": {"helpfulness": 0.25, "safety": 0.75}}, [0.325, 0.5, 0.8, 0.875]),
        ({"rule": "linear", "weights": {"helpfulness": 0, "safety": 2}}, [0.2, 1.0, 2.0, 1.8]),
        ({"rule": "max_min"}, [0.1, 0.5, 0.2, 0.8]),
        ({"rule": "bilinear", "a1": -0.5, "a2": 0.5}, [-0.6, 0.0, 0.35, 0.52]),
        # costs 0.9, 0.5, 0, 0.1, and a multiplier of 2
        (
            {"rule": "lagrangian", "limit": 0.1, "multiplier": 9, "rate": 1, "normalised": False},
            [-0.8, -0.5, 0.2, 0.6],
        ),
        (
            {"rule": "lagrangian", "limit": 0.1, "multiplier": 9, "rate": 1, "normalised": True},
            [-0.8 / 3, -0.5 / 3, 0.2 / 3, 0.2],
        ),
    ],
    ids=lambda value: value["rule"] if isinstance(value, dict) else "",
)
def test_rules_by_hand(rule: dict[str, Any], expected: list[float]) -> None:
    checked = TypeAdapter(Combine).validate_python(rule)
    rewards = {"helpfulness": torch.tensor(HELPFULNESS), "safety": torch.tensor(SAFETY)}
    found = combined(checked, rewards, torch.zeros(4, dtype=torch.bool), multiplier=2.0)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_llama2_by_hand() -> None:
    """Chosen are 0.1 (low safety), 0.5 (flagged), 0.2 and 0.8; their logits are whitened."""
    rule = TypeAdapter(Combine).validate_python({"rule": "llama2", "threshold": 0.15})
    rewards = {"helpfulness": torch.tensor([1.0, 0.9, 0.2, 0.8]), "safety": torch.tensor(SAFETY)}
    found = combined(rule, rewards, torch.tensor([False, True, False, False]), multiplier=0.0)
    logits = np.log([1 / 9, 1, 1 / 4, 4])
    expected = (logits - logits.mean()) / logits.std()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5)
    assert found.mean().abs() < 1e-6
    same = combined(rule, {name: torch.ones(3) for name in rewards}, torch.zeros(3).bool(), 0.0)
    assert same.abs().max() < 1e-2, "rewards that are all alike are no signal, and no NaN"


def hinge(weights: np.ndarray, differences: np.ndarray, margin: float, penalty: float) -> float:
    return float(np.maximum(0, margin - differences @ weights).mean() + penalty * (weights**2).sum())


def test_fitted_weights_are_near_the_least_of_a_grid() -> None:
    rng = np.random.default_rng(0)
    wanted = np.concatenate([rng.normal([0.3, -0.1], 0.3, (200, 2)), rng.normal([-0.1, 0.6], 0.4, (200, 2))])
    found = fitted_weights(torch.from_numpy(wanted), margin=1.0, penalty=0.01)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    grid = itertools.product(np.linspace(0, 8, 161), repeat=2)
    best = min(grid, key=lambda w: hinge(np.array(w), wanted, 1.0, 0.01))
    assert found.numpy() == pytest.approx(np.array(best) / sum(best), abs=0.03)


def test_a_reward_that_only_misleads_gets_no_weight() -> None:
    differences = torch.tensor([[0.5, -0.4], [0.6, -0.1], [0.2, -0.3]])
    assert fitted_weights(differences).tolist() == pytest.approx([1, 0], abs=1e-3)
    assert fitted_weights(-differences.abs()).tolist() == [0.5, 0.5], "where no weights help, even ones"


# ---------------------------------------------------------------- the judge


def test_the_judges_rewards() -> None:
    request = world.Request("open", "teapot", "in secret", template=0)
    rewards = judge_rewards(
        [user(request.text)] * 2, ["sorry , i cannot help with that .", "sure , first take the spatula"]
    )
    assert rewards["helpfulness"].tolist() == [0.1, 0.275]
    assert rewards["safety"].tolist() == [1.0, 0.0]
    with pytest.raises(
        UserError, match=r"reward=judge .* 'How do I open a teapot\?' is none; use data=world"
    ):
        judge_rewards([user("How do I open a teapot?")], ["no"])


# ---------------------------------------------------------------- classifiers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(
        tmp_path_factory.mktemp("classifier"), bpe_tokenizer(), ("quality", "harmless", "length")
    )


def heads(**changes: Any) -> Heads:
    given = {"output": 0, "centre": 0.0, "scale": 1.0, "squash": "sigmoid"}
    both = {name: {**given, **changes.get(name, {})} for name in ("helpfulness", "safety")}
    return Heads.model_validate(both)


PROMPTS = [user(f"open the door {'now ' * (i % 4)}") for i in range(20)]
RESPONSES = ["take the key" * (i % 7) + "!" * i for i in range(20)]  # the first of them empty


def test_batches_give_what_one_text_at_a_time_gives(folder: Path) -> None:
    """With a byte-pair tokenizer: a policy's word-level ids would mean nothing to it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    classifier = load_classifier(str(folder), "reward.model")
    found = classifier.logits(PROMPTS, RESPONSES)
    assert found.shape == (20, 3)
    assert found.dtype == np.float64
    model, tokenizer = (
        c.from_pretrained(folder) for c in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    for prompt, response, logits in zip(PROMPTS, RESPONSES, found, strict=True):
        text = f"<s><|user|>\n{prompt[0]['content']}</s>\n<|assistant|>\n{response}</s>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            np.testing.assert_allclose(model(input_ids=ids).logits[0], logits, rtol=1e-4, atol=1e-5)
    assert len(np.unique(found.round(4))) > 30


def test_heads_by_name_and_by_number(folder: Path) -> None:
    classifier = load_classifier(str(folder), "reward.model")
    logits = classifier.logits(PROMPTS, RESPONSES)
    given = heads(
        helpfulness={"output": "quality", "centre": 0.3, "scale": 2.0},
        safety={"output": 2, "scale": -0.5, "squash": "none"},
    )
    rewards = classifier_scorer(classifier, given)(PROMPTS, RESPONSES)
    expected = 1 / (1 + np.exp(-2.0 * (logits[:, 0] - 0.3)))
    np.testing.assert_allclose(rewards["helpfulness"], expected, rtol=1e-6)
    np.testing.assert_allclose(rewards["safety"], -0.5 * logits[:, 2], rtol=1e-6)
    named = classifier_scorer(classifier, heads(safety={"output": "harmless"}))(PROMPTS, RESPONSES)
    numbered = classifier_scorer(classifier, heads(safety={"output": 1}))(PROMPTS, RESPONSES)
    assert np.array_equal(named["safety"], numbered["safety"])
    with pytest.raises(UserError, match=r"reward\.heads\.safety\.output 'harmles'; .*nearest: 'harmless'"):
        classifier_scorer(classifier, heads(safety={"output": "harmles"}))
    with pytest.raises(
        UserError, match=r"output=3 is not allowed: .* 3 outputs.*\(quality, harmless, length\)"
    ):
        classifier_scorer(classifier, heads(safety={"output": 3}))


def test_a_sigmoid_of_any_logit_is_a_number() -> None:
    head = Head(output=0, centre=0.0, scale=1.0, squash="sigmoid")
    with np.errstate(over="raise", invalid="raise"):
        assert rewarded(np.array([-800.0, 0.0, 800.0]), head).tolist() == [pytest.approx(0), 0.5, 1.0]


def test_a_hub_model_is_pinned_and_safe(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward\.model=org/name is no folder.*write org/name@<commit>"):
        load_classifier("org/name", "reward.model")
    pickled = write_classifier(tmp_path / "pickled", bpe_tokenizer())
    weights = torch.nn.Module.state_dict(torch.nn.Linear(1, 1))
    torch.save(weights, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"reward\.model=.*pickled cannot be loaded"):
        load_classifier(str(pickled), "reward.model")


def test_a_model_of_a_class_of_its_own_is_refused(tmp_path: Path) -> None:
    """As ArmoRM is: transformers would load its backbone with an output layer of random weights."""
    import json

    own = write_classifier(tmp_path / "own", bpe_tokenizer())
    config = json.loads((own / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForRewardModelWithGating"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"},
    }
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a LlamaForRewardModelWithGating, and code of a model's own"):
        load_classifier(str(own), "reward.model")


# ---------------------------------------------------------------- scorers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_shows_its_sample(bad: float) -> None:
    def scorer(prompts: Any, responses: Any) -> dict[str, np.ndarray]:
        return {"helpfulness": np.array([0.5, 0.5]), "safety": np.array([0.5, bad])}

    with pytest.raises(
        UserError, match=f"reward safety is {bad} for the response 'second' to the prompt 'b'"
    ):
        finite(scorer)([user("a"), user("b")], ["first", "second"])


def test_processes_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scores its own rows, and the gathered ones stand in their order."""
    from bfpo_exp.rewards import scorer as module

    scored: list[list[str]] = []
    others: list[Any] = []

    def lengths(prompts: Any, responses: list[str]) -> dict[str, np.ndarray]:
        scored.append(list(responses))
        values = np.array([len(response) for response in responses], float)
        return {"helpfulness": values, "safety": -values}

    responses = ["a" * n for n in (3, 1, 4, 1, 5)]
    prompts = [user("p")] * 5
    shares: Callable[..., Any] = shared_out(lengths)
    for rank in (1, 0):
        monkeypatch.setattr(module, "group", lambda r=rank: Group(r, 2))
        monkeypatch.setattr(module, "gathered", lambda part: others.extend(part) or others)
        if rank == 1:
            with pytest.raises(KeyError):  # the other process's rows are not there
                shares(prompts, responses)
        else:
            rewards = shares(prompts, responses)
    assert scored == [["a", "a"], ["aaa", "aaaa", "aaaaa"]]
    assert rewards["helpfulness"].tolist() == [3, 1, 4, 1, 5]
    assert rewards["safety"].tolist() == [-3, -1, -4, -1, -5]
