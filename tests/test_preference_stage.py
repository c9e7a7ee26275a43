"""The preference stage: what it checks, stages before it, and what of the pairs each loss sees."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from bfpo_exp.config.schema import STREAMS, Config
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.paths import SHARED, Rows
from bfpo_exp.logprobs.reference import PairLogps, reference_logps
from bfpo_exp.models.output import ModelCard
from bfpo_exp.models.policy import load_policy
from bfpo_exp.paths import HOME_VARIABLE
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.stages import preference as stage
from bfpo_exp.stages.base import base_model
from bfpo_exp.stages.context import Context, Weights
from bfpo_exp.store import Store
from bfpo_exp.tracking.metrics_file import MetricsFile
from bfpo_exp.train import preference
from bfpo_exp.train.preference import PreferenceObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The last bits of numbers do not depend on the machine."""
    with cpu_threads(1):
        yield


SMALL_RUN = [
    "stages=[reference,preference]",
    "data.pairs.world_helpfulness.size=12",
    "data.pairs.world_safety.size=12",
    *[f"model.architecture.{name}=16" for name in ("hidden_size", "intermediate_size")],
    "model.architecture.num_hidden_layers=1",
    "+model.architecture.initializer_range=0.2",
    "train.steps=2",
    "train.batch=8",
    "train.microbatch=8",
    "train.log_every=1",
]


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Callable[..., Config]) -> Context:
    """A run of the preference stage on a few pairs of the world, from random weights."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return Context(config(*SMALL_RUN), Store(tmp_path / "store"), MetricsFile(tmp_path / "metrics.jsonl"))


def test_a_run_asserts_its_first_loss(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    another = context.config.model.model_copy(update={"seed": 1})
    of_another = base_model(replace(context, config=context.config.model_copy(update={"model": another})))
    other = load_policy(of_another.path, another, own=True, device=context.device)
    reference = base_model(context)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "reference_logps", lambda model, *arguments: reference_logps(other, *arguments))
        with pytest.raises(AssertionError, match="not those of the model that is trained"):
            stage.policy(context, reference)
    entries = {path.name for path in (context.store.root / "reference").glob("[!.]*")}
    shutil.rmtree(context.store.root / "reference")
    assert len(entries) == 2  # one for each stream
    assert not any(path.is_dir() for path in (context.store.root / "policy").glob("[!.]*"))

    trained = stage.policy(context, reference)
    assert (Path(trained.path) / "model.safetensors").is_file()
    card = (Path(trained.path) / "README.md").read_text()
    assert "pairs of helpfulness" in card
    assert "pairs of safety" in card
    steps = {entry.step for entry in context.metrics.read() if "train/loss" in entry.metrics}
    assert steps == {1, 2}


def metric_names(context: Context) -> set[str]:
    return {name for entry in context.metrics.read() for name in entry.metrics}


@pytest.mark.parametrize("loss", ["sacpo", "modpo"])
def test_a_first_stage_is_trained_first(
    loss: str, context: Context, config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SACPO starts from the first policy and is held to it; MODPO starts from the SFT model."""
    context = replace(context, config=config(*SMALL_RUN, f"loss={loss}"))
    start = base_model(context)
    seen = []
    real = stage._train

    def watched(
        context: Context,
        model: PreTrainedModel,
        objective: PreferenceObjective,
        folder: Path,
        card: ModelCard,
    ) -> None:
        seen.append((context, {n: t.clone() for n, t in model.state_dict().items()}, objective))
        real(context, model, objective, folder, card)

    def starts_from(weights: dict[str, Tensor], folder: Weights) -> bool:
        model = load_policy(folder.path, context.config.model, own=True, device="cpu")
        return all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())

    monkeypatch.setattr(stage, "_train", watched)
    trained = stage.policy(context, start)
    (first, first_start, first_objective), (second, second_start, objective) = seen
    assert (first.config.loss.name, second.config.loss.name) == ("dpo", loss)
    assert starts_from(first_start, start)
    names = metric_names(context)
    assert {"first/loss", "first/pairs_per_second", "train/loss", "perf/pairs_per_second"} <= names

    # An ordinary run of the first stage's loss has made, or makes, the very same policy.
    alone = replace(context, config=first.config, metrics=MetricsFile(context.store.root / "other.jsonl"))
    policy = stage.policy(alone, start)
    assert len(seen) == 2
    assert "train/loss" in metric_names(alone)
    if loss == "sacpo":
        assert starts_from(second_start, policy)
        assert not starts_from(second_start, start)
        assert set(objective.pairs.stream) == {1}
        assert set(first_objective.pairs.stream) == {0, 1}
    else:
        assert starts_from(second_start, start)
        assert set(first_objective.pairs.stream) == {1}
        view = objective.view(np.arange(6))
        model = load_policy(policy.path, context.config.model, own=True, device="cpu")
        with torch.no_grad():
            sums, _ = SHARED.logps(model, view.rows)
        rewards = 0.2 * (sums.view(-1, 2) - torch.stack([view.given["ref_w"], view.given["ref_l"]], 1))
        margins = torch.stack([view.given["margin_w"], view.given["margin_l"]], 1)
        torch.testing.assert_close(margins, rewards, rtol=1e-4, atol=1e-5)
        assert margins.abs().max() > 1e-4
    assert trained.path != policy.path


def test_log_probs_that_are_not_finite_stop_the_run_and_name_the_pairs(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def broken(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor]:
        sums, counts = SHARED.logps(model, rows)
        calls.append(rows)
        return sums.index_fill(0, torch.tensor([4, 7]), float("nan")) if len(calls) == 2 else sums, counts

    monkeypatch.setattr(preference, "chosen_path", lambda *_: replace(SHARED, logps=broken))
    with pytest.raises(UserError, match="log-probs are not finite at step 2 for training pairs") as error:
        stage.policy(context, base_model(context))
    pairs = stage._pairs(*(stage.tokenised_stream(context, s) for s in STREAMS))
    nothing = np.zeros(len(pairs), np.float32)
    logps = PairLogps(nothing, nothing, nothing + 1, nothing + 1)
    (batch,) = PreferenceObjective(pairs, logps, context.config, "cpu").microbatches(1)
    assert torch.equal(batch.rows.input_ids, calls[1].input_ids)
    low, high = sorted(batch.indices[[2, 3]])  # y_w of the third pair, y_l of the fourth
    assert f"training pairs {low}, {high} (rows from 0 of the streams" in str(error.value)
    assert "train.lr" in str(error.value)


def test_safedpo_never_sees_the_pairs_that_it_drops(
    preference_config: Callable[..., Config], random_pairs: Callable[..., TokenisedPairs]
) -> None:
    pairs = random_pairs(60)
    counts = np.ones(60)
    logps = PairLogps(*(np.zeros(60, np.float32),) * 2, counts, counts)
    objective = PreferenceObjective(pairs, logps, preference_config("safedpo"), "cpu")
    dropped = (pairs.safe_w == 0) & (pairs.safe_l == 0)
    drawn = np.concatenate([objective.batches[step] for step in range(20)])
    assert 0 < dropped.sum() < 60
    assert objective.rows == 60 - dropped.sum()
    assert set(drawn) == set(np.flatnonzero(~dropped))


def test_without_a_reference_the_loss_is_still_measured_against_it(
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    model, pairs = tiny_model(), random_pairs(40)
    run = preference_config("dpo", loss__reference_free=True)
    objective = PreferenceObjective(pairs, reference_logps(model, pairs, SHARED), run, "cpu")
    _, sums = objective.loss(model, batch := objective.view(objective.batches[0]))
    values = sums.read()
    given = batch.given
    expected = -torch.nn.functional.logsigmoid(0.2 * (given["ref_w"] - given["ref_l"])).mean()
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert values["loss_at_reference"] == pytest.approx(expected.item(), rel=1e-5)
    assert values["kl"] == pytest.approx(0, abs=1e-4)
