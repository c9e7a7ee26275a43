"""The losses and their gradients against another implementation: TRL's ``DPOTrainer``, version 1.16.

Both sides get the same weights of a policy and of another model as the reference, and the same pairs: ours
as token ids, TRL's as text, of which its trainer has to make the same ids.  Ours is the path of a training
step: `reference_logps`, then `PreferenceObjective`.  Held equal, in float32 on the CPU: the loss to 1e-5 of
its value, and every gradient of the policy's weights to 1e-5 of the largest one.

How TRL's definitions relate to ours:

- ``sigmoid``, ``hinge`` and ``robust`` are the DPO, hinge and robust DPO losses on summed log-probs.
- ``sigmoid_norm`` and ``ipo`` divide each response's summed log-ratio by the response's number of tokens,
  the end of turn among them: our DPO and IPO with ``logps: mean``.  There is no IPO on sums.
- ``sigmoid`` leaves ``label_smoothing`` out without a warning, so no loss type is conservative DPO.  ``aot``
  smooths the same formula, but of policy and reference margins that it sorts over the batch; a batch of
  one pair has nothing to sort.  So for that loss TRL gets the pairs one by one.
- TRL takes the mean over the pairs of a micro-batch, we divide by the pairs of the step: the same for
  micro-batches of one size.
- TRL ends a response of plain text with the tokenizer's EOS if it does not end so.  The text here leaves it
  out, and our ids have it.
- TRL truncates to 1024 tokens and computes in bfloat16 if it is not told otherwise; both are turned off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from model_support import END_OF_TURN, VOCABULARY
from torch import Tensor

from bfpo_exp.config.schema import Config
from bfpo_exp.data.pairs import TokenisedPairs
from bfpo_exp.logprobs.paths import SHARED
from bfpo_exp.logprobs.reference import reference_logps
from bfpo_exp.train.preference import PreferenceObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from trl import DPOTrainer

PAIRS = 16
Step = tuple[float, dict[str, Tensor]]  # the loss, and its gradient for each of the policy's weights


@dataclass(frozen=True)
class Case:
    """One loss, in our words and in TRL's."""

    loss: str
    ours: dict[str, Any]
    trl: dict[str, Any]
    trl_batch: int = PAIRS  # pairs that TRL's loss sees at once


SMOOTHED = {"beta": 0.1, "label_smoothing": 0.1}
CASES = {
    "dpo": Case("dpo", {"logps": "sum", "beta": 0.1}, {"loss_type": "sigmoid", "beta": 0.1}),
    "dpo_mean": Case("dpo", {"logps": "mean", "beta": 2.0}, {"loss_type": "sigmoid_norm", "beta": 2.0}),
    "cdpo": Case("cdpo", {"logps": "sum", **SMOOTHED}, {"loss_type": "aot", **SMOOTHED}, trl_batch=1),
    "robust_dpo": Case("robust_dpo", {"logps": "sum", **SMOOTHED}, {"loss_type": "robust", **SMOOTHED}),
    "hinge": Case("hinge", {"logps": "sum", "beta": 0.1}, {"loss_type": "hinge", "beta": 0.1}),
    "ipo_mean": Case("ipo", {"logps": "mean", "beta": 0.5}, {"loss_type": "ipo", "beta": 0.5}),
}
# Changes of our setting that must be seen in the loss.
CHANGES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"beta": 2 * case.ours["beta"]}) for name, case in CASES.items()),
    ("cdpo", {"label_smoothing": 0.0}),
    ("robust_dpo", {"label_smoothing": 0.0}),
    ("dpo_mean", {"logps": "sum"}),
    ("ipo_mean", {"logps": "sum"}),
]
changes = pytest.mark.parametrize(
    ("name", "change"), CHANGES, ids=[f"{name}-{next(iter(change))}" for name, change in CHANGES]
)


@pytest.fixture(scope="module")
def pairs(random_pairs: Callable[..., TokenisedPairs]) -> TokenisedPairs:
    return random_pairs(PAIRS)


@pytest.fixture
def our_step(
    pairs: TokenisedPairs,
    tiny_model: Callable[..., PreTrainedModel],
    preference_config: Callable[..., Config],
) -> Callable[..., Step]:
    """Our loss of all pairs in one micro-batch, with settings of the loss other than the case's."""

    def step(case: Case, **changes: Any) -> Step:
        settings = {f"loss__{key}": value for key, value in (case.ours | changes).items()}
        config = preference_config(case.loss, loss__order="helpfulness", **settings)
        policy, reference = tiny_model(seed=0), tiny_model(seed=1)
        objective = PreferenceObjective(pairs, reference_logps(reference, pairs, SHARED), config, "cpu")
        loss, _ = objective.loss(policy, objective.view(np.arange(PAIRS)))
        loss.backward()
        return loss.item(), gradients(policy)

    return step


@pytest.fixture
def trainer(
    pairs: TokenisedPairs,
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Case], DPOTrainer]:
    """TRL's trainer of a case, on new models of the same weights: it patches those that it gets."""
    # Where this is not set, every trainer that is made reports itself to the Hugging Face Hub.
    monkeypatch.setenv("CI", "true")

    def made(case: Case) -> DPOTrainer:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer(
            tiny_model(seed=0),
            tiny_model(seed=1),
            DPOConfig(
                str(tmp_path),
                report_to="none",
                use_cpu=True,
                bf16=False,
                max_length=None,
                per_device_eval_batch_size=case.trl_batch,
                **case.trl,
            ),
            train_dataset=Dataset.from_dict(
                {
                    "prompt": as_text(pairs.prompt_ids),
                    "chosen": as_text(ids[:-1] for ids in pairs.w_ids),
                    "rejected": as_text(ids[:-1] for ids in pairs.l_ids),
                }
            ),
            processing_class=tokenizer(),
        )

    return made


def as_text(rows: Iterable[list[int]]) -> list[str]:
    return ["".join(f"<{i}>" for i in ids) for ids in rows]


def tokenizer() -> PreTrainedTokenizerFast:
    """Reads what `as_text` writes, and adds no token of its own."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<0>"))
    words.pre_tokenizer = Split(Regex(r"<\d+>"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<1>", eos_token=f"<{END_OF_TURN}>", pad_token="<0>"
    )


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def trl_step(trainer: DPOTrainer) -> Step:
    """TRL's mean loss over its batches, which its own tokens, collator and loss make."""
    batches = list(trainer.get_eval_dataloader(trainer.train_dataset))
    loss = torch.stack([trainer.compute_loss(trainer.model, batch) for batch in batches]).mean()
    loss.backward()
    return loss.item(), gradients(trainer.model)


def test_trl_makes_our_token_ids_of_the_text(
    trainer: Callable[[Case], DPOTrainer], pairs: TokenisedPairs
) -> None:
    rows = trainer(CASES["dpo"]).train_dataset
    assert rows["prompt_ids"][:] == pairs.prompt_ids
    assert rows["chosen_ids"][:] == pairs.w_ids
    assert rows["rejected_ids"][:] == pairs.l_ids


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradients_are_trls(
    case: Case, our_step: Callable[..., Step], trainer: Callable[[Case], DPOTrainer]
) -> None:
    loss, ours = our_step(case)
    expected, theirs = trl_step(trainer(case))
    assert loss == pytest.approx(expected, rel=1e-5, abs=0)
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    assert largest > 0
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().max().item() <= 1e-5 * largest, name


@changes
def test_another_setting_is_not_trls_loss(
    name: str,
    change: dict[str, Any],
    our_step: Callable[..., Step],
    trainer: Callable[[Case], DPOTrainer],
) -> None:
    """At least a hundred times the tolerance apart, so the equality above can fail."""
    loss, _ = our_step(CASES[name], **change)
    expected, _ = trl_step(trainer(CASES[name]))
    assert loss != pytest.approx(expected, rel=1e-3, abs=0)
