"""Log-probs with shared prompts: those of the padded path, in float32 to 1e-5, gradients too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bfpo_exp.errors import UserError
from bfpo_exp.logprobs import head
from bfpo_exp.logprobs.attention import Segments, attend, varlen_attention
from bfpo_exp.logprobs.head import token_logps
from bfpo_exp.logprobs.paths import KNOWN, PADDED, SHARED, LogpsPath, chosen_path, no_shared_prompts
from bfpo_exp.logprobs.shared import SharedRow
from bfpo_exp.models.numerics import Hardware
from bfpo_exp.train.engine import PlainEngine
from bfpo_exp.train.loop import train
from bfpo_exp.train.parts import _halved
from bfpo_exp.train.preference import PreferenceObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bfpo_exp.config.schema import Config
    from bfpo_exp.data.pairs import TokenisedPairs

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(3, 64, count).tolist()


def groups(seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts with one to three responses of 1 to 30 tokens."""
    rng = np.random.default_rng(seed)
    prompts = [[1, *tokens(rng, n)] for n in (0, 5, 20, 1, 9)]
    lengths = [(4, 7), (1, 3, 1), (30, 1), (1,), (12, 25)]
    return prompts, [[[*tokens(rng, n - 1), 2] for n in several] for several in lengths]


def weighted_gradients(
    model: PreTrainedModel, path: LogpsPath, device: str = "cpu"
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sums and counts, and the gradients of a weighted total of the sums."""
    model.zero_grad(set_to_none=True)
    sums, counts = path.logps(model, path.rows(*groups(), device))
    weights = torch.linspace(-1, 1, len(sums), device=device)
    (sums * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sums.detach(), counts, gradients


def made(kind: str, **fields: Any) -> PreTrainedModel:
    """A tiny random model whose outputs are far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(kind, **(TINY | fields))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter + noise if parameter.dim() == 1 else 5 * parameter)
    return model


# ---------------------------------------------------------------- law 5


@pytest.mark.parametrize("kind", KNOWN)
def test_padded_equals_shared(kind: str) -> None:
    model = made(kind)
    expected, counts, gradients = weighted_gradients(model, PADDED)
    found, lengths, others = weighted_gradients(model, SHARED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(lengths, counts)
    assert gradients.keys() == others.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("trainable", [["mlp.down_proj"], ["lm_head"]], ids=["down_proj", "lm_head"])
def test_gradients_of_some_weights(kind: str, trainable: list[str]) -> None:
    from bfpo_exp.models.policy import select_trainable

    model = made(kind, tie_word_embeddings=False)
    select_trainable(model, trainable)
    expected, _, gradients = weighted_gradients(model, PADDED)
    found, _, others = weighted_gradients(model, SHARED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(gradients) == (1 if trainable == ["lm_head"] else 2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_in_bfloat16_to_its_rounding(kind: str) -> None:
    model = made(kind)
    exact, counts = PADDED.logps(model, PADDED.rows(*groups(), "cpu"))
    model.to(torch.bfloat16)
    found, _ = SHARED.logps(model, SHARED.rows(*groups(), "cpu"))
    assert found.dtype == torch.float32
    assert ((found - exact) / counts).abs().max() < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("window", [None, 16])
def test_on_a_gpu_padded_equals_shared(kind: str, window: int | None) -> None:
    """Against float32; with a sliding window shorter than the longest pair, too."""
    fields = {} if kind == "llama" else {"sliding_window": window, "use_sliding_window": window is not None}
    model = made(kind, hidden_size=128, head_dim=32, **fields).cuda()
    model.config._attn_implementation = "sdpa"
    exact, counts, _ = weighted_gradients(model, PADDED, "cuda")
    model.to(torch.bfloat16)
    rounded, _, expected = weighted_gradients(model, PADDED, "cuda")
    found, _, gradients = weighted_gradients(model, SHARED, "cuda")
    error, allowed = (((sums - exact) / counts).abs().max() for sums in (found, rounded))
    assert error < 2 * allowed + 0.02
    for name, gradient in expected.items():
        assert F.cosine_similarity(gradients[name].flatten(), gradient.flatten(), dim=0) > 0.98


def test_runs_agree_for_100_steps(
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    """The loss of every step, by the padded and by the fast path, with all weights trained."""
    from bfpo_exp.logprobs.reference import reference_logps
    from bfpo_exp.models.policy import select_trainable

    pairs, losses = random_pairs(64), {}
    for path in (PADDED, SHARED):
        model = tiny_model()
        run = preference_config("dpo", model__forward=path.name, train__microbatch=4, train__lr=1e-4)
        objective = PreferenceObjective(pairs, reference_logps(model, pairs, path), run, "cpu")
        assert objective.path is path
        engine = PlainEngine(model, select_trainable(model, "all"), run.train, 100)
        log: list[float] = []
        train(engine, objective, 100, 1, lambda taken, values, log=log: log.append(values["loss"]))  # type: ignore[misc]
        losses[path.name] = log
    assert len(losses["shared"]) == 100
    assert np.mean(losses["shared"][-10:]) < 0.8 * np.mean(losses["shared"][:10])
    np.testing.assert_allclose(losses["shared"], losses["padded"], rtol=1e-4)


# ---------------------------------------------------------------- the layout


def test_a_row_by_hand() -> None:
    row = SharedRow.of([[1, 10, 11], [1]], [[[20, 21, 2], [30, 2]], [[2], [40, 41, 2]]])
    assert row.input_ids.tolist() == [[1, 10, 11, 20, 21, 30, 1, 40, 41]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert row.segments == Segments(((0, 5), (5, 6), (6, 7), (7, 9)), ((0, 0), (0, 3), (6, 6), (6, 7)))
    assert row.predicting.tolist() == [2, 3, 4, 2, 5, 6, 6, 7, 8]
    assert row.targets.tolist() == [20, 21, 2, 30, 2, 2, 40, 41, 2]
    assert row.response_mask.sum(1).tolist() == [3, 2, 1, 3]
    with pytest.raises(ValueError, match="a response without tokens"):
        SharedRow.of([[1]], [[[]]])


def test_the_model_is_as_it_was_afterwards(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    SHARED.logps(model, SHARED.rows(*groups(), "cpu"))
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model.get_output_embeddings())
    with pytest.raises(ValueError, match="no sliding window on a CPU"):
        SHARED.logps(made("mistral", sliding_window=8), SHARED.rows(*groups(), "cpu"))
    assert model.config._attn_implementation == before


def by_a_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    *most: int,
    scale: float,
    window: int,
) -> Tensor:
    """What a kernel for sequences of different lengths is to compute, written out."""
    outs = []
    for i in range(len(query_ends) - 1):
        queries = q[query_ends[i] : query_ends[i + 1]].transpose(0, 1)
        keys, values = (t[key_ends[i] : key_ends[i + 1]].transpose(0, 1) for t in (k, v))
        repeats = queries.shape[0] // keys.shape[0]
        place = torch.arange(queries.shape[1])[:, None] + keys.shape[1] - queries.shape[1]
        distance = place - torch.arange(keys.shape[1])
        seen = (distance >= 0) & ((distance <= window) if window >= 0 else torch.tensor(True))
        scores = scale * queries @ keys.repeat_interleave(repeats, 0).transpose(1, 2)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append((weights @ values.repeat_interleave(repeats, 0)).transpose(0, 1))
    return torch.cat(outs)


def test_arguments_for_kernels_of_gpus() -> None:
    """The keys that are gathered, the ends and the alignment: against the CPU's own way, in float64."""
    rng = torch.Generator().manual_seed(0)
    row = SHARED.rows(*groups(), "cpu")
    length = row.input_ids.shape[1]
    q, k, v = (torch.randn(1, heads, length, 8, generator=rng, dtype=torch.float64) for heads in (4, 2, 2))
    expected, _ = attend(
        torch.nn.Identity(), q, k, v, None, segments=row.segments, scaling=0.3, kernel=by_a_loop
    )
    found = varlen_attention(by_a_loop, q, k, v, row.segments, 0.3, None)
    torch.testing.assert_close(found, expected)
    in_window = varlen_attention(by_a_loop, q, k, v, row.segments, 0.3, 5)
    assert not torch.allclose(in_window, expected)
    start, end = row.segments.spans[0]
    torch.testing.assert_close(
        in_window[:, start : min(start + 5, end)], expected[:, start : min(start + 5, end)]
    )


# ---------------------------------------------------------------- the head


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_never_exist_whole(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK, "cpu", 2 * 500)  # two tokens at a time
    hidden = torch.randn(60, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=not frozen)
    targets = torch.randint(500, (60,))
    with Largest() as seen:
        logps = token_logps(hidden, weight, targets)
        (logps * torch.linspace(-1, 1, 60)).sum().backward()
    assert seen.elements <= max(2 * 500, weight.numel())
    found = [t.grad for t in (hidden, weight) if t.grad is not None]
    for tensor in (hidden, weight):
        tensor.grad = None
    expected = F.linear(hidden, weight).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * torch.linspace(-1, 1, 60)).sum().backward()
    torch.testing.assert_close(logps, expected)
    for gradient, tensor in zip(found, (hidden, weight), strict=False):
        torch.testing.assert_close(gradient, tensor.grad)


# ---------------------------------------------------------------- which path


HERE = Hardware(None, bf16=True, flash_attn="not looked for")
H100 = Hardware((9, 0), bf16=True, flash_attn=None)


@pytest.mark.parametrize(
    ("change", "hardware", "reason"),
    [
        ({}, HERE, None),
        ({"architecture": {**TINY, "model_type": "bloom"}}, HERE, "models of type bloom are not known"),
        ({"trust_remote_code": True}, HERE, "are not known"),
        ({"attention": "eager"}, HERE, "model.attention=eager"),
        ({"architecture": {**TINY, "model_type": "mistral", "sliding_window": 63}}, HERE, "window of 63"),
        ({"architecture": {**TINY, "model_type": "mistral", "sliding_window": 64}}, HERE, None),
        (
            {
                "architecture": {
                    **TINY,
                    "model_type": "llama",
                    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                }
            },
            HERE,
            "positions of type dynamic",
        ),
        ({}, Hardware((7, 5), bf16=False, flash_attn=None), "no FlashAttention"),
    ],
)
def test_models_that_cannot(
    change: dict[str, Any], hardware: Hardware, reason: str | None, config: Callable[..., Config]
) -> None:
    model = config().model.model_copy(update=change)
    found = no_shared_prompts(model, 64, hardware)
    assert (found is None) if reason is None else (reason in (found or ""))


def test_the_setting_decides_and_auto_says_what_it_came_to(
    config: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    from bfpo_exp.models import numerics

    numerics.say.cache_clear()
    model = config().model
    assert chosen_path(model, 64) is SHARED
    assert chosen_path(model.model_copy(update={"forward": "padded"}), 64) is PADDED
    bloom = model.model_copy(update={"architecture": {**TINY, "model_type": "bloom"}})
    with caplog.at_level("INFO"):
        assert chosen_path(bloom, 64) is PADDED
        assert chosen_path(bloom, 64) is PADDED
    assert [r.message for r in caplog.records if "forward" in r.message] == [
        "forward: padded (no shared prompts: models of type bloom are not known to it)"
    ]
    with pytest.raises(UserError, match=r"model\.forward=shared cannot work here: models of type bloom"):
        chosen_path(bloom.model_copy(update={"forward": "shared"}), 64)


# ---------------------------------------------------------------- micro-batches by tokens


@pytest.mark.parametrize("forward", ["shared", "padded"])
def test_micro_batches_keep_to_their_tokens_and_change_nothing(
    forward: str,
    preference_config: Callable[..., Config],
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
) -> None:
    from bfpo_exp.logprobs.reference import reference_logps

    model, pairs = tiny_model(), random_pairs(64, longest=60)
    logps = reference_logps(model, pairs, SHARED)
    results = []
    for budget in (None, 150):
        run = preference_config("bfpo", model__forward=forward, train__tokens_per_microbatch=budget)
        objective = PreferenceObjective(pairs, logps, run, "cpu")
        batches = list(objective.microbatches(3))
        assert sorted(i for b in batches for i in b.indices) == sorted(objective.batches[3])
        assert sum(pairs.stream[i] for b in batches for i in b.indices) == 8  # of 16
        for batch in batches if budget else ():
            lengths = [pairs.lengths[i] for i in batch.indices]
            assert len(lengths) == 1 or objective.path.positions(lengths) <= budget
            if forward == "shared":
                assert objective.path.positions(lengths) == batch.rows.input_ids.numel()
        model.zero_grad(set_to_none=True)
        for batch in batches:
            objective.loss(model, batch)[0].backward()
        results.append((len(batches), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (whole, expected), (parts, found) = results
    assert (whole, parts > 3) == (1, True)
    for gradient, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_all_processes_have_as_many_micro_batches() -> None:
    assert _halved([(0, 4), (4, 5)], 2) == [(0, 4), (4, 5)]
    assert _halved([(0, 4), (4, 5)], 4) == [(0, 1), (1, 2), (2, 4), (4, 5)]
    assert _halved([(0, 3)], 3) == [(0, 1), (1, 2), (2, 3)]
