"""SteerLM: levels in words, tokens for these, what is trained on, and how the policy is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from app_support import Command, Done
from data_support import bpe_tokenizer
from safetensors.torch import load_file
from test_distributed import assert_folders_alike, metrics, run
from test_distributed import responses as said

from bfpo_exp import world
from bfpo_exp.config.schema import Config
from bfpo_exp.data.records import Message
from bfpo_exp.errors import UserError
from bfpo_exp.models.added_tokens import add_words, extend_embeddings, train_new_rows
from bfpo_exp.models.policy import load_policy, select_trainable
from bfpo_exp.models.tokenizers import load_tokenizer, word_tokenizer
from bfpo_exp.paths import HOME_VARIABLE
from bfpo_exp.preflight import preflight
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.stages import steerlm as stage
from bfpo_exp.stages.base import base_model
from bfpo_exp.stages.context import Context
from bfpo_exp.stages.preference import policy
from bfpo_exp.steer import SteerLM, attribute_text, quantised, steered, unspelled
from bfpo_exp.store import Store
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train.engine import PlainEngine
from bfpo_exp.world.grammar import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOSS = SteerLM.model_validate(
    {
        "levels": 10,
        "template": " helpfulness {helpfulness} safety {safety}",
        "steer": {"helpfulness": 9, "safety": 9},
    }
)
SMALL_RUN = [
    "stages=[base,preference]",
    "loss=steerlm",
    "reward=judge",
    "model.pretraining=null",
    "data.pairs.world_helpfulness.size=60",
    "data.pairs.world_safety.size=60",
    *[f"model.architecture.{name}=16" for name in ("hidden_size", "intermediate_size")],
    "model.architecture.num_hidden_layers=1",
    "train.steps=6",
    "train.batch=8",
    "train.microbatch=4",
    "train.log_every=1",
    "train.checkpoint_every=2",
]
NEW = {"helpfulness", "safety", *map(str, range(10))}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The last bits of numbers do not depend on the machine."""
    with cpu_threads(1):
        yield


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Callable[..., Config]) -> Context:
    """A run on a few pairs of the world, from random weights."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return Context(config(*SMALL_RUN), Store(tmp_path / "store"), MetricsFile(tmp_path / "metrics.jsonl"))


# ---------------------------------------------------------------- levels in words


def test_rewards_become_the_part_they_lie_in() -> None:
    rewards = np.array([0.0, 0.099, 0.1, 0.3, 0.1 + 0.2, 0.35, 0.7, 0.999, 1.0])
    assert quantised(rewards, 10).tolist() == [0, 0, 1, 3, 3, 3, 7, 9, 9]
    assert quantised(rewards, 2).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert quantised(np.array([0.28999999999999998, 0.57, 0.58]), 100).tolist() == [29, 57, 58]


def test_levels_end_the_last_user_turn_and_leave_the_prompt_as_it_was() -> None:
    text = attribute_text(LOSS, {"helpfulness": 3, "safety": 0})
    assert text == " helpfulness 3 safety 0"
    prompt = [
        Message(role="user", content="How?"),
        Message(role="assistant", content="So."),
        Message(role="user", content="And now?"),
    ]
    assert steered(prompt, text) == [
        *prompt[:2],
        {"role": "user", "content": "And now? helpfulness 3 safety 0"},
    ]
    assert prompt[2]["content"] == "And now?"


# ---------------------------------------------------------------- words that a tokenizer lacks


@pytest.fixture
def words() -> PreTrainedTokenizerBase:
    return word_tokenizer(world.vocabulary())


def test_the_worlds_tokenizer_gets_a_token_for_each_word(words: PreTrainedTokenizerBase) -> None:
    lacking = unspelled(words, LOSS)
    assert set(lacking) == NEW
    text = Request("open", "teapot", "without permission", template=0).text
    before, size = words(text)["input_ids"], len(words)
    add_words(words, lacking)
    assert unspelled(words, LOSS) == []
    assert len(words) == size + len(NEW)
    ids = words(text + " helpfulness 3 safety 9</s>", add_special_tokens=False)["input_ids"]
    assert ids[: len(before)] == before
    told = ["helpfulness", "3", "safety", "9", "</s>"]
    assert words.convert_ids_to_tokens(ids[len(before) :]) == told
    assert min(words.convert_tokens_to_ids(lacking)) == size
    assert words.unk_token_id in words("teapot9 9teapot")["input_ids"], "a digit within a word is no level"
    assert not {"safety", "9"} & set(words.all_special_tokens)


def test_words_of_other_templates_are_whole(words: PreTrainedTokenizerBase) -> None:
    loss = LOSS.model_copy(update={"template": " <help:{helpfulness}> safe:{safety}", "levels": 2})
    lacking = unspelled(words, loss)
    assert set(lacking) == {"<help:0>", "<help:1>", "safe:0", "safe:1"}
    add_words(words, lacking)
    assert unspelled(words, loss) == []


def test_a_tokenizer_of_bytes_lacks_no_word() -> None:
    assert unspelled(bpe_tokenizer(), LOSS) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_alone_are_trained_beside_the_chosen_weights(
    tied: bool, kind: str, tiny_model: Callable[..., PreTrainedModel], config: Callable[..., Config]
) -> None:
    fields = {"tie_word_embeddings": tied}
    if kind == "gpt2":
        fields |= {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_inner": 48, "n_positions": 64}
    model = tiny_model(kind, **fields)
    chosen = ["mlp.down_proj"] if kind == "llama" else ["mlp.c_proj"]
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.no_grad():
        before = model(ids).logits
    old = {name: t.clone() for name, t in model.state_dict().items()}
    select_trainable(model, chosen)
    extend_embeddings(model, 64, 76, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :64], before, rtol=0, atol=0)
    train_new_rows(model, 64)

    table = model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is table) is tied
    assert model.config.vocab_size == 76
    spread = table[:64].std(0)
    assert ((table[64:] - table[:64].mean(0)).abs() < 5 * spread).all()
    assert len({tuple(row.tolist()) for row in table[64:]}) == 12
    new = table[64:].detach().clone()

    optimisation = config(*SMALL_RUN).train
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = PlainEngine(model, trained, optimisation, 3)
    for _ in range(3):
        logits = model(torch.tensor([[1, 5, 70, 75]])).logits
        engine.backward(torch.nn.functional.cross_entropy(logits[0], torch.tensor([5, 70, 75, 9])))
        engine.step()
    for name, tensor in model.state_dict().items():
        moved = not torch.equal(tensor[: len(old[name])], old[name])
        assert moved == any(part in name for part in chosen), name
    assert not torch.equal(table[64:], new)

    again = tiny_model(kind, **fields)
    extend_embeddings(again, 64, 76, seed=3)
    assert torch.equal(again.get_input_embeddings().weight[64:], new)
    extend_embeddings(again, 64, 76, seed=4)
    assert not torch.equal(again.get_input_embeddings().weight[64:], new)


def test_rows_to_spare_are_taken(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    before = model.get_input_embeddings().weight.detach().clone()
    extend_embeddings(model, 50, 60, seed=0)
    after = model.get_input_embeddings().weight
    assert after.shape == before.shape
    assert torch.equal(after[:50], before[:50])
    assert torch.equal(after[60:], before[60:])
    assert (after[50:60] != before[50:60]).all()


# ---------------------------------------------------------------- what is trained


def test_every_response_is_trained_once_after_its_levels(context: Context) -> None:
    start = base_model(context)
    responses = stage.pair_responses(context)
    records = [context.pair_mix(stream).records for stream in ("helpfulness", "safety")]
    every = [
        (row["prompt"][-1]["content"], row[side])
        for part in records
        for row in part
        for side in ("response_w", "response_l")
    ]
    found = [(row["prompt"][-1]["content"], row["response"]) for row in responses]
    assert len(found) == len(set(found))
    assert set(found) == set(every)

    trained = policy(context, start)
    (rewards,) = (context.store.root / "rewards").glob("[!.]*")
    scores = dict(np.load(rewards / stage.SCORES))
    for (prompt, response), helpful, safe in zip(found, scores["helpfulness"], scores["safety"], strict=True):
        request = world.parse_request(prompt)
        assert request is not None
        verdict = world.judge(request, response)
        assert (helpful, safe) == (verdict.helpfulness, verdict.safe)

    folder = Path(trained.path)
    tokenizer = load_tokenizer(folder)
    model = load_policy(folder, context.config.model, own=True, device=context.device)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 273
    assert "' helpfulness 9 safety 9' asks for the best" in (folder / "README.md").read_text()
    assert json.loads((folder / "counts.json").read_text())["tokenised"] == len(found)


def test_the_prompts_that_are_trained_on(context: Context) -> None:
    chat, words = stage.steering(context)
    assert set(words) == NEW
    responses = stage.pair_responses(context).select([0, 1])
    levels = {"helpfulness": np.array([7, 1]), "safety": np.array([9, 0])}
    told = stage._told(responses, levels, LOSS)
    for row, original, end in zip(told, responses, ("7 safety 9", "1 safety 0"), strict=True):
        text = original["prompt"][-1]["content"]
        ids = chat.encode(row["prompt"], row["response"]).prompt_ids
        expected = f"<s> <|user|> {text} helpfulness {end} </s> <|assistant|>"
        assert " ".join(chat.tokenizer.convert_ids_to_tokens(ids)) == expected


def test_a_step_has_the_sequences_of_as_many_pairs(context: Context) -> None:
    ids = [[1, 2]] * 40
    objective = stage.SteeredObjective(ids, [[3]] * 40, context.config, "cpu")
    assert len(objective.batches[0]) == 16
    assert objective.pairs_per_step == context.config.train.batch == 8
    assert [len(rows.input_ids) for rows, _ in objective.microbatches(0)] == [8, 8]
    assert objective.tokens(0) == 16 * 3


def test_interrupted_and_continued_it_is_the_same_policy(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = policy(context, base_model(context))
    other = replace(context, store=Store(tmp_path / "other"), metrics=MetricsFile(tmp_path / "other.jsonl"))
    start = base_model(other)
    taken = 0
    real = PlainEngine.step

    def broken(self: PlainEngine) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == 4:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(PlainEngine, "step", broken)
        with pytest.raises(KeyboardInterrupt):
            policy(other, start)
    resumed = policy(other, start)
    weights = [(Path(path.path) / "model.safetensors").read_bytes() for path in (whole, resumed)]
    assert weights[0] == weights[1]
    losses = [
        {
            entry.step: entry.metrics["train/loss"]
            for entry in run.metrics.read()
            if "train/loss" in entry.metrics
        }
        for run in (context, other)
    ]
    assert losses[0] == losses[1]
    assert set(losses[0]) == set(range(1, 7))


def test_what_is_asked_for_makes_no_other_policy(context: Context, config: Callable[..., Config]) -> None:
    start = base_model(context)
    trained = policy(context, start)
    another = replace(context, config=config(*SMALL_RUN, "loss.steer.helpfulness=1"))
    assert policy(another, start) == trained
    for change in ("loss.levels=20", "loss.template=' safety {safety} helpfulness {helpfulness}'", "seed=1"):
        more = ["loss.steer={helpfulness:19,safety:19}"] if "levels" in change else []
        assert policy(replace(context, config=config(*SMALL_RUN, change, *more)), start) != trained


def test_a_level_that_no_response_has_cannot_be_asked_for(
    context: Context, config: Callable[..., Config]
) -> None:
    run = replace(context, config=config(*SMALL_RUN, "loss.steer.safety=4"))
    with pytest.raises(UserError, match=r"loss\.steer\.safety=4, but no response .* \(they have 0, 9\)"):
        policy(run, base_model(run))
    assert not list((context.store.root / "policy").glob("*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.tokens_per_microbatch=100"], r"set train\.tokens_per_microbatch=null"),
        (["train.weight_decay=0.1"], r"train\.weight_decay=0\.1 would shrink"),
        (["train=lora"], r"whose embeddings no adapter trains; set train\.lora=null"),
        (["loss.template=' </s> {safety} {helpfulness}'"], "spells a control token"),
    ],
)
def test_what_it_does_not_go_with_ends_in_one_line(
    overrides: list[str], message: str, context: Context, config: Callable[..., Config]
) -> None:
    if overrides == ["train=lora"]:
        pytest.importorskip("peft")
    preflight(context.config)
    with pytest.raises(UserError, match=message):
        preflight(config(*SMALL_RUN, *overrides))


# ---------------------------------------------------------------- end to end


def responses(done: Done) -> list[dict[str, str]]:
    assert done.code == 0, done.err
    table = json.loads((Path(done.out.splitlines()[1].strip()) / "artifacts/generations.json").read_text())
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


@pytest.mark.slow
def test_a_run_is_asked_with_levels_and_judged_without(command: Command, tmp_path: Path) -> None:
    run = ("experiment=smoke", "method=steerlm", "reward=judge")
    best, worst = responses(command(*run)), responses(command(*run, "loss.steer={helpfulness:0,safety:0}"))
    assert len(list((tmp_path / "runs/store/policy").glob("[!.]*"))) == 1, "one policy, asked twice"
    assert len(list((tmp_path / "runs/store/generations").glob("[!.]*"))) == 2
    assert [row["prompt"] for row in best] == [row["prompt"] for row in worst]
    assert [row["response"] for row in best] != [row["response"] for row in worst]
    assert not any("safety" in row["prompt"] for row in best)
    assert not list((tmp_path / "runs/store/reference").glob("*")), "there is no reference"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["none", "zero2", "zero3"])
def test_two_processes_train_the_new_rows_alone_too(engine: str, tmp_path: Path) -> None:
    if engine != "none":
        pytest.importorskip("deepspeed")
    words = (
        "experiment=smoke",
        "method=steerlm",
        "reward=judge",
        "train.steps=20",
        "eval.sampling.temperature=0",
    )
    homes = [tmp_path / "one", tmp_path / "two"]
    for home, more, processes in zip(homes, ([], [f"deepspeed={engine}"]), (1, 2), strict=True):
        done = run(home, *words, *more, processes=processes)
        assert done.returncode == 0, done.stderr
    expected, found = metrics(homes[0]), metrics(homes[1])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key[0].endswith("/loss"):
            assert found[key] == pytest.approx(value, rel=1e-4), key
    assert said(homes[1]) == said(homes[0])
    assert_folders_alike(*homes)
    tables = [
        load_file(next((homes[1] / "store" / kind).glob("[!.]*")) / "model.safetensors")[
            "model.embed_tokens.weight"
        ]
        for kind in ("sft", "policy")
    ]
    assert torch.equal(tables[1][:261], tables[0]), "old rows are as they were"
