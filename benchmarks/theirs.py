"""TRL's side: ``DPOTrainer`` 1.16 on the same work, with the same settings.

TRL's defaults are others for gradient checkpointing (off here), for precision (bfloat16 by autocast; here it
is the weights' dtype on both sides), and for the rate (constant here).  Fused AdamW without decay and
clipping to norm 1 are the defaults of both.  Each step's pairs come in the order in which our side sorts
them, by length, so that micro-batches waste the least padding.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from benchmarks.cases import BETA, RATE, SEED, Case, Work
from benchmarks.gate import Gate, Over, Seen
from benchmarks.workload import MAX_LENGTH
from bfpo_exp.models.policy import select_trainable


def run(case: Case, work: Work, gate: Gate) -> Seen:
    """Train as the case says, until the gate's last repetition is over."""
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        trainer = made_trainer(case, work, seen, folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Told(gate, seen))
        gate.first_step()
        with contextlib.suppress(Over):
            trainer.train()
    return seen


def made_trainer(case: Case, work: Work, seen: Seen, folder: str) -> DPOTrainer:
    """The trainer.  Its constructor computes the reference, where that is to be done ahead."""
    model = loaded(case)
    select_trainable(model, "all" if case.trained == "all" else [case.trained])
    records = work.context.pair_mix("helpfulness").records
    assert len(records) == len(work.pairs)
    order = [row for batch in work.batches for row in batch]
    trainer = TimedTrainer(
        seen,
        model,
        loaded(case).requires_grad_(False) if case.reference == "live" else None,
        DPOConfig(
            folder,
            beta=BETA,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_steps=case.total,
            per_device_train_batch_size=case.microbatch,
            gradient_accumulation_steps=case.batch // case.microbatch,
            train_sampling_strategy="sequential",
            precompute_ref_log_probs=case.reference == "cached",
            max_length=MAX_LENGTH,
            gradient_checkpointing=False,
            bf16=case.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            seed=SEED,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([conversation(records[row]) for row in order]),
        processing_class=AutoTokenizer.from_pretrained(case.model),
    )
    tokens = trainer.train_dataset
    assert isinstance(tokens, Dataset)
    for theirs, ours in {
        "prompt_ids": work.pairs.prompt_ids,
        "chosen_ids": work.pairs.w_ids,
        "rejected_ids": work.pairs.l_ids,
    }.items():
        assert tokens[theirs][:] == [ours[row] for row in order], theirs
    return trainer


def loaded(case: Case) -> PreTrainedModel:
    """The case's model; the trainer takes it to its device."""
    return AutoModelForCausalLM.from_pretrained(case.model, dtype=getattr(torch, case.dtype))


def conversation(record: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """A pair in the form that TRL trains on."""
    return {
        "prompt": record["prompt"],
        "chosen": [{"role": "assistant", "content": record["response_w"]}],
        "rejected": [{"role": "assistant", "content": record["response_l"]}],
    }


class TimedTrainer(DPOTrainer):
    """TRL's trainer, which tells how fast it computes the reference ahead."""

    def __init__(self, seen: Seen, *args: Any, **settings: Any) -> None:
        self._seen = seen
        super().__init__(*args, **settings)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        started = time.perf_counter()
        with_reference = super()._precompute_ref_logps(dataset, name, batch_size)
        self._seen.reference_pairs_per_second = len(dataset) / (time.perf_counter() - started)
        return with_reference


class Told(TrainerCallback):
    """Holds the training at the gate after each step, and keeps what it logs."""

    def __init__(self, gate: Gate, seen: Seen) -> None:
        self.gate, self.seen = gate, seen

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After each step of the optimiser."""
        self.gate.step(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,
    ) -> None:
        """After `on_step_end`."""
        self.seen.losses.append(more["logs"]["loss"])
        self.seen.gradient_norms.append(more["logs"]["grad_norm"])
