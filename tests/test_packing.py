"""Packed rows: documents that cannot see each other, and a loss that packing does not change."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bfpo_exp.config.schema import Config
from bfpo_exp.config.training import SftOptimisation
from bfpo_exp.errors import UserError
from bfpo_exp.logprobs.packed import (
    Document,
    PackedRows,
    check_isolation,
    dealt,
    first_fit_decreasing,
    row_logps,
    token_logps,
)
from bfpo_exp.logprobs.padded import PaddedRows
from bfpo_exp.logprobs.padded import token_logps as padded_logps
from bfpo_exp.runtime import cpu_threads
from bfpo_exp.train.demonstrations import DemonstrationObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROW_LENGTH = 100
# A window that is shorter than documents, so that it has to be counted within a document.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # learned positions
}
Model = Callable[..., "PreTrainedModel"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with cpu_threads(1):
        yield


def made(tiny_model: Model, kind: str, attention: str) -> PreTrainedModel:
    model = tiny_model(kind, **ARCHITECTURES[kind])
    model.set_attn_implementation(attention)
    return model


def conversations(n: int, seed: int = 0) -> tuple[list[list[int]], list[list[int]], list[list[bool]]]:
    """Prompts, responses of 1 to 50 tokens, and which of their tokens are trained (the last one is)."""
    rng = np.random.default_rng(seed)
    prompts = [[1, *rng.integers(3, 64, rng.integers(1, 10)).tolist()] for _ in range(n)]
    responses = [[*rng.integers(3, 64, rng.integers(0, 50)).tolist(), 2] for _ in range(n)]
    trained = [[*(rng.random(len(response) - 1) < 0.6).tolist(), True] for response in responses]
    return prompts, responses, trained


# ---------------------------------------------------------------- which rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_every_item_is_in_one_row_and_no_two_rows_could_be_one(lengths: list[int]) -> None:
    rows = first_fit_decreasing(lengths, 50)
    assert Counter(item for row in rows for item in row) == Counter(range(len(lengths)))
    sizes = [sum(lengths[item] for item in row) for row in rows]
    assert max(sizes) <= 50
    assert sum(sorted(sizes)[:2]) > 50 or len(rows) == 1


def test_an_item_that_fits_no_row() -> None:
    with pytest.raises(UserError, match="a conversation of 9 tokens does not fit a packed row of 8"):
        first_fit_decreasing([3, 9], 8)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60), st.sampled_from([1, 2, 3, 8]), st.integers(1, 5)
)
def test_processes_have_as_many_micro_batches(lengths: list[int], processes: int, most: int) -> None:
    """Whatever the lengths; only too few conversations for the processes are refused."""
    rows = first_fit_decreasing(lengths, 50)
    if len(lengths) < processes:
        with pytest.raises(UserError, match=r"cannot be shared by \d processes; raise train\.sft\.batch"):
            dealt(rows, lengths, processes, most)
        return
    lengths = lengths[: len(lengths) // processes * processes]  # as the batch has to be
    parts = dealt(first_fit_decreasing(lengths, 50), lengths, processes, most)
    assert len(parts) % processes == 0
    assert all(1 <= len(part) <= most for part in parts)
    assert Counter(i for part in parts for row in part for i in row) == Counter(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for part in parts for row in part) <= 50


# ---------------------------------------------------------------- the same log-probs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("in_a_micro_batch", [1, 4])
def test_packed_log_probs_are_those_of_padded_rows(
    kind: str, attention: str, in_a_micro_batch: int, tiny_model: Model
) -> None:
    """Token by token, in rows of several documents with and without padding."""
    model = made(tiny_model, kind, attention)
    prompts, responses, _ = conversations(12)
    padded = PaddedRows.of(prompts, responses)
    with torch.no_grad():
        expected = padded_logps(model, padded)
    of_tokens = [row[mask] for row, mask in zip(expected, padded.response_mask, strict=True)]
    documents = [
        Document([*p, *r], [False] * len(p) + [True] * len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    rows = first_fit_decreasing([len(document.ids) for document in documents], ROW_LENGTH)
    assert any(len(row) > 2 for row in rows)
    for start in range(0, len(rows), in_a_micro_batch):
        part = rows[start : start + in_a_micro_batch]
        packed = PackedRows.of([[documents[i] for i in row] for row in part])
        with torch.no_grad():
            logps, (sums, counts) = token_logps(model, packed), row_logps(model, packed)
        for number, row in enumerate(part):
            wanted = torch.cat([of_tokens[i] for i in row])
            torch.testing.assert_close(
                logps[number][packed.wanted_mask[number]], wanted, atol=1e-5, rtol=1e-5
            )
            assert counts[number] == len(wanted)
            torch.testing.assert_close(sums[number], wanted.sum(), atol=1e-5, rtol=1e-5)
    check_isolation(model, "cpu")


def test_what_flash_attention_gets(tiny_model: Model) -> None:
    """It takes documents by their ends in the rows laid end to end, padding included."""
    long, short = Document(range(5, 10), [True] * 5), Document([1, 2], [True] * 2)
    rows = PackedRows.of([[long, short], [short]])
    assert rows.ends.tolist() == [0, 5, 7, 9, 14]
    assert rows.ends.dtype == torch.int32
    assert rows.longest == 5
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    # The first token of a document is predicted by nothing, though another document stands before it.
    assert rows.wanted_mask.long().tolist() == [[1, 1, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0]]


def by_ends(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Causal attention as a variable-length kernel computes it: by the ends alone, with no mask."""
    assert mask is None
    ends = given["cu_seq_lens_q"].tolist()
    assert ends == given["cu_seq_lens_k"].tolist()
    assert given["max_length_q"] == given["max_length_k"] == max(np.diff(ends))
    flat = [part.transpose(1, 2).flatten(0, 1).transpose(0, 1) for part in (query, key, value)]
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(part[:, start:end] for part in flat), is_causal=True, enable_gqa=True
        )
        for start, end in pairwise(ends)
    ]
    out = torch.cat(parts, 1).transpose(0, 1)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def test_a_kernel_that_goes_by_the_ends_alone(tiny_model: Model) -> None:
    """What flash attention is given reaches every layer, and says the same as the position ids."""
    from transformers import AttentionInterface

    AttentionInterface.register("by_ends", by_ends)
    model = tiny_model()
    prompts, responses, trained = conversations(12)
    documents = [
        Document([*p, *r], [*[False] * len(p), *t])
        for p, r, t in zip(prompts, responses, trained, strict=True)
    ]
    packing = first_fit_decreasing([len(document.ids) for document in documents], ROW_LENGTH)
    packed = PackedRows.of([[documents[i] for i in row] for row in packing])
    with torch.no_grad():
        expected = token_logps(model, packed)
        model.set_attn_implementation("by_ends")
        torch.testing.assert_close(token_logps(model, packed), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_flash_attention_keeps_documents_apart(kind: str, tiny_model: Model) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    model = tiny_model(kind, dtype=torch.bfloat16, **ARCHITECTURES[kind]).cuda()
    prompts, responses, _ = conversations(12)
    documents = [
        Document([*p, *r], [False] * len(p) + [True] * len(r))
        for p, r in zip(prompts, responses, strict=True)
    ]
    packing = first_fit_decreasing([len(document.ids) for document in documents], ROW_LENGTH)
    packed = PackedRows.of([[documents[i] for i in row] for row in packing], "cuda")
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = token_logps(model, packed)
        model.set_attn_implementation("flash_attention_2")
        torch.testing.assert_close(token_logps(model, packed), expected, atol=0.1, rtol=0.05)
    check_isolation(model, "cuda")


class Leaking(nn.Module):
    """A model in which every token sees all before it, whatever their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 64)

    def forward(self, input_ids: Tensor, **rest: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.embedding(input_ids).cumsum(1))


class Choosy(Leaking):
    def forward(self, input_ids: Tensor) -> SimpleNamespace:  # type: ignore[override]
        return super().forward(input_ids)


def test_a_model_that_cannot_keep_documents_apart_is_refused() -> None:
    with pytest.raises(UserError, match=r"see one another; set train\.sft\.packing=false"):
        check_isolation(Leaking(), "cpu")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the model takes no packed rows"):
        check_isolation(Choosy(), "cpu")  # type: ignore[arg-type]
    objective = DemonstrationObjective([[1]], [[2]], settings(batch=1), "cpu", row_length=8)
    with pytest.raises(UserError, match=r"train\.sft\.packing=true"):
        objective.loss(Leaking(), next(objective.microbatches(0)))


def test_the_check_leaves_the_model_as_it_was(tiny_model: Model) -> None:
    model = tiny_model("gpt2", **ARCHITECTURES["gpt2"], attn_pdrop=0.5).train()
    check_isolation(model, "cpu")
    assert model.training


# ---------------------------------------------------------------- the same training


def settings(**changes: Any) -> SftOptimisation:
    return SftOptimisation(**{**SETTINGS, **changes})


SETTINGS: dict[str, Any] = {}


@pytest.fixture(autouse=True, scope="module")
def default_settings(config: Callable[..., Config]) -> None:
    SETTINGS.update(config().train.sft.model_dump(), batch=16, microbatch=16)


def gradients(
    model: PreTrainedModel, objective: DemonstrationObjective, step: int
) -> tuple[float, dict[str, Tensor], int]:
    """A step's loss, its gradients, and the number of its micro-batches."""
    model = copy.deepcopy(model)
    total, count = 0.0, 0
    for batch in objective.microbatches(step):
        loss, sums = objective.loss(model, batch)
        loss.backward()
        total, count = total + loss.item(), count + 1
        assert sums.means["loss"][1] > 0
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, count


def assert_same(
    one: tuple[float, dict[str, Tensor], int], other: tuple[float, dict[str, Tensor], int]
) -> None:
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            other[1][name], gradient, atol=1e-5 * gradient.abs().max().item(), rtol=1e-4
        )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_packing_changes_neither_loss_nor_gradients(kind: str, tiny_model: Model) -> None:
    model = tiny_model(kind, **ARCHITECTURES[kind])
    prompts, responses, trained = conversations(40)
    for step in range(2):
        plain = DemonstrationObjective(prompts, responses, settings(), "cpu", trained=trained)
        expected = gradients(model, plain, step)
        for microbatch in (1, 3, 16):
            packed = DemonstrationObjective(
                prompts,
                responses,
                settings(microbatch=microbatch),
                "cpu",
                trained=trained,
                row_length=ROW_LENGTH,
            )
            assert_same(expected, gradients(model, packed, step))


def test_the_loss_is_the_mean_over_the_trained_tokens(tiny_model: Model) -> None:
    """By one forward pass for each conversation."""
    model = tiny_model()
    prompts, responses, trained = conversations(16)
    objective = DemonstrationObjective(prompts, responses, settings(), "cpu", trained=trained)
    chosen: list[Tensor] = []
    for prompt, response, flags in zip(prompts, responses, trained, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
        logps = logits.log_softmax(-1)
        for place, (token, flag) in enumerate(zip(response, flags, strict=True)):
            if flag:
                chosen.append(logps[len(prompt) + place - 1, token])
    loss, _, _ = gradients(model, objective, 0)
    assert loss == pytest.approx(-torch.stack(chosen).mean().item(), rel=1e-5)


def test_tokens_that_are_not_trained_have_no_gradient(tiny_model: Model) -> None:
    """Another token in their place changes what it conditions, so only the targets are looked at."""
    prompts, responses = [[1, 5]], [[6, 7, 8, 2]]
    for row_length in (None, 8):
        _, changed = (
            gradients(
                tiny_model(tie_word_embeddings=False),
                DemonstrationObjective(
                    prompts, responses, settings(batch=1), "cpu", trained=[flags], row_length=row_length
                ),
                0,
            )
            for flags in ([True] * 4, [False, False, False, True])
        )
        head = changed[1]["lm_head.weight"]
        # Of one target the head's rows sum to zero, each being (p - onehot) times the hidden state.
        assert head.sum(0).abs().max() < 1e-5
        hidden = head[2]
        assert all(torch.linalg.matrix_rank(torch.stack([hidden, head[t]]), tol=1e-6) == 1 for t in (6, 7, 8))


def test_processes_together_take_the_step_of_one(monkeypatch: pytest.MonkeyPatch, tiny_model: Model) -> None:
    """Their gradients add up to those of one process, and they have as many micro-batches."""
    model = tiny_model()
    prompts, responses, trained = conversations(40)
    for row_length in (None, ROW_LENGTH):
        objective = DemonstrationObjective(
            prompts, responses, settings(microbatch=2), "cpu", trained=trained, row_length=row_length
        )
        whole = gradients(model, objective, 0)
        monkeypatch.setenv("WORLD_SIZE", "4")
        parts = []
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(gradients(model, objective, 0))
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("RANK")
        assert len({count for _, _, count in parts}) == 1
        summed = {name: torch.stack([part[1][name] for part in parts]).sum(0) for name in whole[1]}
        assert_same(whole, (sum(part[0] for part in parts), summed, 0))


def test_columns_may_be_read_from_disk(tiny_model: Model) -> None:
    from datasets import Dataset

    prompts, responses, trained = conversations(20)
    table = Dataset.from_dict({"prompt_ids": prompts, "response_ids": responses, "trained": trained})
    model = tiny_model()
    for row_length in (None, ROW_LENGTH):
        both = [
            DemonstrationObjective(p, r, settings(), "cpu", trained=t, row_length=row_length)
            for p, r, t in (
                (prompts, responses, trained),
                (table["prompt_ids"], table["response_ids"], table["trained"]),
            )
        ]
        one, other = (gradients(model, objective, 0) for objective in both)
        assert one[0] == other[0]
        assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
