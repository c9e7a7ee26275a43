"""Log-probs of responses: the padded path against one plain forward pass a row; the reference's pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from model_support import END_OF_TURN, VOCABULARY
from torch import Tensor

from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.logprobs import reference
from bfpo_exp.logprobs.padded import PaddedRows, response_logps, token_logps
from bfpo_exp.logprobs.paths import PADDED, SHARED, LogpsPath
from bfpo_exp.logprobs.reference import PairLogps, reference_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 8},  # shorter than most rows
    "qwen2": {},
}
PROMPTS = [[1, 9], [1, 5, 6, 7, 8, 9, 10, 11, 12], [1], [1, 40, 41, 42]]
RESPONSES = [
    [2],
    [13, 2],
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 2],
    [50, 51, 52, 53, 2],
]


def plain(model: PreTrainedModel, prompt: list[int], response: list[int]) -> list[float]:
    """The log-prob of each response token from one unpadded sequence, token by token."""
    ids = [*prompt, *response]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]


@pytest.fixture(params=sorted(KINDS))
def model(request: pytest.FixtureRequest, tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(request.param, **KINDS[request.param])


# ---------------------------------------------------------------- padded rows


def test_rows_by_hand() -> None:
    rows = PaddedRows.of([[5, 6], [7]], [[8], [9, 10, 2]])
    assert rows.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert rows.response_mask.tolist() == [[False, True, False], [True, True, True]]
    assert (rows.input_ids * rows.attention_mask).tolist() == [[5, 6, 8, 0], [7, 9, 10, 2]]


def test_padded_equals_plain_row_by_row(model: PreTrainedModel) -> None:
    with torch.no_grad():
        sums, counts = response_logps(model, PaddedRows.of(PROMPTS, RESPONSES))
    expected = [sum(plain(model, p, r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert sums.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert counts.tolist() == [len(response) for response in RESPONSES]


def test_each_token_stands_where_its_logits_are(model: PreTrainedModel) -> None:
    with torch.no_grad():
        logps = token_logps(model, PaddedRows.of(PROMPTS, RESPONSES))
    for row, prompt, response in zip(logps, PROMPTS, RESPONSES, strict=True):
        start, end = len(prompt) - 1, len(prompt) + len(response) - 1
        assert row[start:end].tolist() == pytest.approx(plain(model, prompt, response), abs=1e-5)
        assert not row[:start].any()
        assert not row[end:].any()


@pytest.mark.parametrize("beside", [[], [0], [3, 1], [2, 2, 0]])
def test_a_row_does_not_depend_on_what_stands_beside_it(model: PreTrainedModel, beside: list[int]) -> None:
    rows = [1, *beside]
    with torch.no_grad():
        sums, _ = response_logps(
            model, PaddedRows.of([PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows])
        )
    assert sums[0].item() == pytest.approx(sum(plain(model, PROMPTS[1], RESPONSES[1])), rel=1e-5, abs=1e-5)


def test_what_stands_in_the_padding_does_not_matter(model: PreTrainedModel) -> None:
    rows = PaddedRows.of(PROMPTS, RESPONSES)
    padding = rows.attention_mask == 0
    assert padding.any()
    other = replace(rows, input_ids=rows.input_ids.masked_fill(padding, VOCABULARY - 1))
    with torch.no_grad():
        sums, of_other = response_logps(model, rows)[0], response_logps(model, other)[0]
    torch.testing.assert_close(of_other, sums, rtol=1e-5, atol=1e-5)


def test_the_end_of_turn_is_part_of_the_response(model: PreTrainedModel) -> None:
    assert all(response[-1] == END_OF_TURN for response in RESPONSES)
    prompts, responses = PROMPTS[1:], RESPONSES[1:]  # the first holds nothing else
    with torch.no_grad():
        whole, counts = response_logps(model, PaddedRows.of(prompts, responses))
        without, fewer = response_logps(model, PaddedRows.of(prompts, [r[:-1] for r in responses]))
    ends = [plain(model, p, r)[-1] for p, r in zip(prompts, responses, strict=True)]
    assert (whole - without).tolist() == pytest.approx(ends, abs=1e-4)
    assert (counts - fewer).tolist() == [1, 1, 1]


def test_a_bf16_model_gives_float32_log_probs(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    rows = PaddedRows.of(PROMPTS, RESPONSES)
    with torch.no_grad():
        sums, _ = response_logps(model, rows)
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    assert logits.dtype == torch.bfloat16
    assert sums.dtype == torch.float32
    in_float32 = logits[:, :-1].float().log_softmax(-1).gather(-1, rows.input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(sums, (in_float32 * rows.response_mask).sum(-1), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    response_logps(model, PaddedRows.of(PROMPTS, RESPONSES))[0].sum().backward()
    gradient = model.get_submodule("model.layers.0.mlp.down_proj").weight.grad
    assert isinstance(gradient, Tensor)
    assert gradient.norm() > 0


# ---------------------------------------------------------------- the reference's pass


def permuted(pairs: TokenisedPairs, order: np.ndarray) -> TokenisedPairs:
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(pairs)):
        column = getattr(pairs, name)
        columns[name] = [column[i] for i in order] if isinstance(column, list) else column[order]
    return TokenisedPairs(**columns)


@pytest.mark.parametrize("path", [PADDED, SHARED], ids=lambda path: path.name)
def test_reference_equals_plain_in_any_order_of_pairs(
    path: LogpsPath,
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "PAIRS", 3)  # several passes, the last of them smaller
    model, pairs = tiny_model(), random_pairs(11)
    done: list[int] = []
    logps = reference_logps(model, pairs, path, done.append)
    assert sum(done) == 11
    assert logps.w_sum.dtype == np.float32
    for sums, counts, responses in (
        (logps.w_sum, logps.w_count, pairs.w_ids),
        (logps.l_sum, logps.l_count, pairs.l_ids),
    ):
        expected = [sum(plain(model, p, r)) for p, r in zip(pairs.prompt_ids, responses, strict=True)]
        np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)
        assert counts.tolist() == [len(response) for response in responses]

    order = np.random.default_rng(0).permutation(11)
    again = reference_logps(model, permuted(pairs, order), path)
    for name, array in vars(logps).items():
        np.testing.assert_allclose(getattr(again, name), array[order], rtol=1e-5, atol=1e-5)


def some_logps(n: int, seed: int) -> PairLogps:
    rng = np.random.default_rng(seed)
    w_sum, l_sum = rng.normal(size=(2, n)).astype(np.float32)
    w_count, l_count = rng.integers(1, 30, (2, n))
    return PairLogps(w_sum, l_sum, w_count, l_count)


def test_saved_log_probs_are_loaded_bit_for_bit(tmp_path: Path) -> None:
    saved = some_logps(7, 0)
    saved.save(tmp_path)
    for name, array in vars(PairLogps.load(tmp_path)).items():
        np.testing.assert_array_equal(array, getattr(saved, name))
        assert array.dtype == getattr(saved, name).dtype


def test_log_probs_of_several_sets_one_after_another() -> None:
    first, second = some_logps(3, 0), some_logps(2, 1)
    both = PairLogps.concatenate([first, second])
    for name, array in vars(both).items():
        assert array.tolist() == getattr(first, name).tolist() + getattr(second, name).tolist()


class Killed(BaseException):
    pass


def test_a_killed_pass_continues_and_gives_the_same_numbers(
    tiny_model: Callable[..., PreTrainedModel],
    random_pairs: Callable[..., TokenisedPairs],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "PAIRS", 3)
    monkeypatch.setattr(reference, "SAVE_SECONDS", 0.0)
    model, pairs = tiny_model(), random_pairs(20)
    expected = reference_logps(model, pairs, SHARED)
    passed: list[int] = []

    def counted(model: PreTrainedModel, rows: Any) -> tuple[Tensor, Tensor]:
        passed.append(len(rows.response_mask) // 2)
        return SHARED.logps(model, rows)

    def until(pairs_done: int) -> Callable[[int], None]:
        done: list[int] = []

        def progress(count: int) -> None:
            done.append(count)
            if sum(done) >= pairs_done:
                raise Killed

        return progress

    path = replace(SHARED, logps=counted)
    for stop in (4, 9):  # passes of three: the second is over at 6, and then the third at 9
        with pytest.raises(Killed):
            reference_logps(model, pairs, path, until(stop), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    last: list[int] = []
    found = reference_logps(model, pairs, path, last.append, tmp_path)
    assert passed == [3] * 6 + [2]  # each pair once, over the three tries
    assert last == [9, 3, 3, 3, 2]
    assert not list(tmp_path.iterdir())
    for name, array in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), array)
