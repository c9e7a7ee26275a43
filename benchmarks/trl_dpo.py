"""One DPO run as a user of TRL writes it: a process that loads a model, trains it and saves it.

Where TRL's defaults would slow it down on a CPU they are changed: no bfloat16, no gradient checkpointing,
micro-batches of the size that is the fastest.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True, help="JSON lines of conversations")
parser.add_argument("--output", required=True)
parser.add_argument("--beta", type=float, required=True)
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--microbatch", type=int, required=True)
parser.add_argument("--precompute", action="store_true", help="the reference's log-probs ahead")
options = parser.parse_args()

trainer = DPOTrainer(
    options.model,
    args=DPOConfig(
        options.output,
        beta=options.beta,
        num_train_epochs=1,
        per_device_train_batch_size=options.microbatch,
        gradient_accumulation_steps=options.batch // options.microbatch,
        precompute_ref_log_probs=options.precompute,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=options.rows, split="train"),
)
trainer.train()
trainer.save_model()
