"""Plans: counted by hand, held to what autograd really keeps, and printed without touching anything."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from app_support import Command

from bfpo_exp.config.schema import Config
from bfpo_exp.config.training import Lora
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.padded import PaddedRows, response_logps
from bfpo_exp.models.policy import select_trainable
from bfpo_exp.paths import config_dir
from bfpo_exp.plan.memory import Setting, activation_bytes, block_bytes, logit_bytes, state_bytes
from bfpo_exp.plan.parameters import Shape, known_shape, trained_parameters
from bfpo_exp.plan.published import beside_published
from bfpo_exp.plan.report import plan, plans
from bfpo_exp.plan.stages import stage_plans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAPER = [file.stem for file in sorted((config_dir() / "experiment" / "paper").glob("*.yaml"))]
MISTRAL = Shape(7_241_732_096, hidden=4096, inner=14336, blocks=32, vocabulary=32000, positions=32768)
DOWN_PROJ = 32 * 4096 * 14336


# ---------------------------------------------------------------- parameters


def decoder_parameters(v: int, h: int, f: int, blocks: int, kv: int, biases: int = 0) -> int:
    """Of a Llama-like model with untied embeddings, by hand; kv is the width of keys and values."""
    attention = 2 * h * h + 2 * h * kv + biases
    return 2 * v * h + blocks * (attention + 3 * h * f + 2 * h) + h


@pytest.mark.parametrize(
    ("name", "expected", "down_proj"),
    [
        ("mistral_7b", decoder_parameters(32000, 4096, 14336, 32, 8 * 128), DOWN_PROJ),
        ("zephyr_7b_beta", 7_241_732_096, DOWN_PROJ),
        ("llama3_8b", decoder_parameters(128256, 4096, 14336, 32, 8 * 128), DOWN_PROJ),
        ("qwen", decoder_parameters(152064, 3584, 18944, 28, 4 * 128, 3584 + 2 * 512), 28 * 3584 * 18944),
    ],
)
def test_parameters_of_the_named_models(
    name: str, expected: int, down_proj: int, config: Callable[..., Config]
) -> None:
    known = known_shape(config(f"model={name}").model)
    assert known is not None
    shape, model = known
    assert shape.parameters == expected
    assert all(parameter.is_meta for parameter in model.parameters())
    assert trained_parameters(model, ["mlp.down_proj"], None) == down_proj
    assert trained_parameters(model, "all", None) == expected


def test_published_size_of_mistral(config: Callable[..., Config]) -> None:
    known = known_shape(config("model=mistral_7b").model)
    assert known is not None
    assert known[0] == MISTRAL


def test_parameters_of_adapters(config: Callable[..., Config]) -> None:
    known = known_shape(config("model=mistral_7b").model)
    assert known is not None
    lora = Lora(rank=16, alpha=32, dropout=0.0, target=["down_proj", "v_proj"])
    assert trained_parameters(known[1], "all", lora) == 32 * 16 * ((14336 + 4096) + (4096 + 1024))


def test_the_plans_random_model_has_the_runs_vocabulary(config: Callable[..., Config]) -> None:
    from bfpo_exp import world
    from bfpo_exp.models.tokenizers import word_tokenizer

    known = known_shape(config().model)
    assert known is not None
    assert known[0].vocabulary == len(word_tokenizer(world.vocabulary()))


# ---------------------------------------------------------------- memory

P, T = MISTRAL.parameters, DOWN_PROJ


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting("float32", 0, 1), (4 * P, 4 * T, 0, 8 * T)),
        (Setting("bfloat16", 0, 1), (2 * P, 4 * T, 4 * T, 8 * T)),
        (Setting("bfloat16", 0, 4), (2 * P, 4 * T, 4 * T, 8 * T)),
        (Setting("bfloat16", 1, 4), (2 * P, 2 * T + T, T, 2 * T)),
        (Setting("bfloat16", 2, 4), (2 * P, T // 2 + T, T, 2 * T)),
        (Setting("bfloat16", 3, 4), (P // 2, T // 2 + T, T, 2 * T)),
    ],
)
def test_states_of_each_zero_stage(setting: Setting, expected: tuple[int, ...]) -> None:
    states = state_bytes(P, T, False, "adamw", setting)
    names = ("weights", "gradients", "master weights", "optimiser state")
    assert tuple(states[name] for name in names) == expected


def test_zero_3_gathers_no_more_than_it_may() -> None:
    small = Setting("bfloat16", 3, 4, live_elements=10**9)
    assert state_bytes(P, T, False, "adamw", small)["gathered weights"] == 2 * 10**9
    large = Setting("bfloat16", 3, 4, live_elements=10**12)
    assert state_bytes(P, T, False, "adamw", large)["gathered weights"] == 2 * P


def test_offloaded_states_are_not_on_the_gpu() -> None:
    offloaded = Setting("bfloat16", 3, 4, offload=True, live_elements=10**9)
    assert set(state_bytes(P, T, False, "adamw", offloaded)) == {"gradients", "gathered weights"}


def test_adapters_are_float32_beside_frozen_weights() -> None:
    states = state_bytes(P, 1000, True, "rmsprop", Setting("bfloat16", 0, 1))
    assert states == {
        "weights": 2 * P + 4000, "gradients": 4000, "master weights": 0, "optimiser state": 4000,
    }  # fmt: skip


def test_the_setting_is_read_from_the_deepspeed_config(config: Callable[..., Config]) -> None:
    zero3 = config("deepspeed=zero3").deepspeed
    assert Setting.of("bfloat16", zero3, 8) == Setting("bfloat16", 3, 8, live_elements=10**9)
    assert Setting.of("float32", config("deepspeed=zero3_offload").deepspeed, 2).offload
    assert Setting.of("float32", config().deepspeed, 1) == Setting("float32", 0, 1)


def test_activations_and_logits_of_mistral_by_hand() -> None:
    tokens = 4 * 2 * 1024
    block = 8 * 4096 + 2 * (4 * 4096 + 4 * 14336)
    kept = activation_bytes(MISTRAL, tokens, "bfloat16", everything=False, checkpointing=False)
    assert kept == tokens * 32 * block
    again = activation_bytes(MISTRAL, tokens, "bfloat16", everything=False, checkpointing=True)
    assert again == tokens * (32 * 2 * 4096 + block)
    assert logit_bytes(MISTRAL, tokens, shared=False) == 12 * 32000 * tokens
    assert logit_bytes(MISTRAL, tokens, shared=True) == 12 * 2**26


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", ["all", ["mlp.down_proj"]])
def test_the_estimate_of_activations_is_what_autograd_keeps(
    kind: str, dtype: torch.dtype, trainable: Any, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    """Of one block more, to 5 %; the attention mask of the padded path is not in it."""
    h, f, sequences, length = 64, 192, 4, 32
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (sequences, length), generator=generator).tolist()
    ids[0] = ids[0][:-5]  # without padding there is no mask, and keys and values are not repeated
    rows = PaddedRows.of([row[:4] for row in ids], [row[4:] for row in ids])

    def kept_bytes(blocks: int) -> int:
        model = tiny_model(kind, dtype=dtype, hidden_size=h, intermediate_size=f, num_hidden_layers=blocks)
        select_trainable(model, trainable)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            response_logps(model, rows)
        return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)

    shape = Shape(0, hidden=h, inner=f, blocks=1, vocabulary=64, positions=None)
    width = torch.finfo(dtype).bits // 8
    mask = sequences * length * length * width
    found = kept_bytes(4) - kept_bytes(3) - mask
    estimate = sequences * length * block_bytes(shape, width, everything=trainable == "all")
    assert estimate == pytest.approx(found, rel=0.05)


# ---------------------------------------------------------------- stages


def test_steps_and_tokens_of_the_papers_preference_stage(config: Callable[..., Config]) -> None:
    """30K + 30K pairs in steps of 64, over 4 GPUs with 4 pairs a pass."""
    (_, stage) = stage_plans(config("experiment=paper/table2", "method=bfpo"), processes=4)
    assert (stage.name, stage.rows, stage.steps, stage.epochs) == ("preference", 60000, 938, 1.0)
    assert (stage.microbatch, stage.accumulation) == (4, 4)
    assert stage.micro_tokens == 4 * 2 * 1024
    assert stage.step_tokens == 64 * 2 * 1024
    assert stage.tokens == 938 * 64 * 2 * 1024


def test_a_stage_of_one_stream_counts_its_rows_alone(config: Callable[..., Config]) -> None:
    (_, stage) = stage_plans(config("experiment=paper/table2", "method=dpo_s"), processes=4)
    assert (stage.rows, stage.steps) == (30000, 469)


def test_rows_that_only_the_data_tell_are_not_guessed(config: Callable[..., Config]) -> None:
    (stage,) = stage_plans(config("experiment=paper/sft"), processes=4)
    assert (stage.rows, stage.steps, stage.tokens) == (None, None, None)
    assert (stage.microbatch, stage.accumulation, stage.length) == (4, 2, 2048)


def test_a_loss_with_a_stage_before_it_has_two(config: Callable[..., Config]) -> None:
    names = [stage.name for stage in stage_plans(config("loss=sacpo"), processes=1)]
    assert names == ["base", "sft", "preference, first loss", "preference"]


def test_a_reward_model_is_planned_where_it_is_trained(config: Callable[..., Config]) -> None:
    (*_, stage) = stage_plans(config("stages=[base,sft,reward]"), processes=2)
    assert (stage.name, stage.unit, stage.rows) == ("reward", "pairs", 3000)
    assert stage.step_tokens == stage.optimisation.batch * 2 * 96
    assert "reward" not in [stage.name for stage in stage_plans(config(), processes=1)]
    *_, told = plan(config("experiment=smoke", "stages=[base,sft,reward]")).split("stage ")
    assert told.startswith("reward\n  8 pairs a step = 1 GPU x 8 x 1 pass; 4 steps on 96 rows at most")
    assert "logits 0.0 MB" in told, "of two outputs, not of the vocabulary"


# ---------------------------------------------------------------- the paper's experiments


@pytest.mark.parametrize("name", ["sft", "table2", "table3", "table4"])
def test_the_papers_experiments_have_the_published_hyperparameters(
    name: str, config: Callable[..., Config]
) -> None:
    rows = beside_published(config(f"experiment=paper/{name}"))
    assert len(rows) > 8
    assert [row for row in rows if row[1] != row[2]] == []


@pytest.mark.parametrize(
    ("name", "method", "loss", "order", "batches", "alpha"),
    [
        ("table2", "dpo", "dpo", "stream", "shuffle", None),
        ("table2", "bfpo", "bfpo", "helpfulness", "balanced", 0.5),
        ("table3", "bfpo", "bfpo", "helpfulness", "shuffle", 0.5),
        ("table3", "ipo", "ipo", "stream", "shuffle", None),
    ],
)
def test_the_rows_of_the_papers_tables(
    name: str, method: str, loss: str, order: str, batches: str, alpha: float | None,
    config: Callable[..., Config],
) -> None:  # fmt: skip
    run = config(f"experiment=paper/{name}", f"method={method}")
    assert (run.loss.name, run.loss.order, run.data.batches) == (loss, order, batches)
    assert (run.loss.hyperparameters["beta"], run.loss.hyperparameters.get("alpha")) == (0.01, alpha)
    start = "mistralai/Mistral-7B-v0.1" if name == "table2" else "HuggingFaceH4/zephyr-7b-beta"
    assert run.model.path == start
    assert ("sft" in run.stages) == (name == "table2")
    assert run.deepspeed.name == "zero3"


def test_the_papers_rl_row_has_as_many_sequence_gradients_as_the_others(
    config: Callable[..., Config],
) -> None:
    _, reward, preference = stage_plans(config("experiment=paper/morl"), processes=4)
    (_, other) = stage_plans(config("experiment=paper/table2", "method=bfpo"), processes=4)
    samples = config("experiment=paper/morl").loss.hyperparameters["samples"]
    assert preference.steps == other.steps == 938
    assert preference.optimisation.batch * samples == 2 * other.optimisation.batch
    assert (reward.name, reward.steps) == ("reward", 938)


# ---------------------------------------------------------------- the command


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise AssertionError("a plan reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setenv("WORLD_SIZE", "4")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PAPER)
def test_every_paper_experiment_is_planned_offline(name: str, command: Command, tmp_path: Path) -> None:
    done = command("--dry-run", f"experiment=paper/{name}")
    assert done.code == 0, done.err
    assert "7,241,732,096 parameters" in done.out
    assert "trained: 1,879,048,192 parameters (mlp.down_proj), 25.9 % of all" in done.out
    assert f"(ZeRO {2 if name == 'morl' else 3}, gradient checkpointing on)" in done.out
    assert "time: no estimate was measured" in done.out
    assert not (tmp_path / "runs").exists(), "nothing is written"


@pytest.mark.usefixtures("offline")
def test_a_sweep_is_planned_once_a_distinct_job(command: Command, tmp_path: Path) -> None:
    done = command("-m", "--dry-run", "experiment=paper/table4", "seed=0,1,2", "hydra/launcher=local")
    assert done.code == 0, done.err
    assert done.out.startswith("12 jobs, 4 distinct\n")
    assert done.out.count("3 jobs, seeds 0, 1, 2") == 4
    for alpha in ("0.5", "0"):
        for batches in ("balanced", "shuffle"):
            assert done.out.count(f"alpha {alpha}), order helpfulness, batches {batches}") == 1
    assert done.out.count("7,241,732,096 parameters") == 1, "what is the same is told once"
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_what_a_run_refuses(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nearest: 'bfpo'" in command("--dry-run", "loss=bfpx").line
    assert "loss.beta=-1" in command("-m", "--dry-run", "loss.beta=0.1,-1,0.2").line
    assert "keeps in parts" in command("--dry-run", "experiment=paper/table2", "method=morl").line
    assert "nearest: 'mlp.down_proj'" in command("--dry-run", "train.trainable=[mlp.down_prj]").line
    assert "has 128 positions" in command("--dry-run", "data.format.max_length=200").line
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "cannot be shared out evenly over 3" in command("--dry-run", "stages=[preference]").line


def test_a_small_model_is_timed(config: Callable[..., Config]) -> None:
    text = plan(config("experiment=smoke"))
    assert text.count("(measured over a few steps; ") == 3
    assert re.search(r"time: [\d.e-]+ s a step, \d+ s in all, on this machine", text)
    assert "loss.beta 0.2 (0.01)" in text


def test_a_model_of_the_hub_without_a_shape(config: Callable[..., Config]) -> None:
    assert "parameters: not known" in plan(config("model=hf", "model.path=some/model", "stages=[preference]"))


def test_the_bandit_has_no_model(config: Callable[..., Config]) -> None:
    assert plans([config("experiment=bandit")]) == "bandit, seed 0: bandit"


def test_a_shape_that_transformers_does_not_know(config: Callable[..., Config]) -> None:
    model = config("model=mistral_7b").model.model_copy(update={"shape": {"model_type": "mistrall"}})
    with pytest.raises(UserError, match=r"model\.shape="):
        known_shape(model)
