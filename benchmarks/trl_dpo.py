"""One DPO run as a user of TRL writes it: a process that loads a model, trains it and saves it.

Where TRL's defaults would slow it down on a CPU they are changed: no bfloat16, no gradient checkpointing.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True)
parser.add_argument("--rows", required=True, help="JSON lines of conversations")
parser.add_argument("--output", required=True)
parser.add_argument("--beta", type=float, required=True)
parser.add_argument("--trained", required=True, help="part of the names of the weights that are trained")
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--microbatch", type=int, required=True)
parser.add_argument("--precompute", action="store_true", help="the reference ahead, once for all runs")
options = parser.parse_args()

# No row is too long; but where rows may be cut, other runs do not find the reference's log-probs again.
ahead = {"precompute_ref_log_probs": True, "max_length": None} if options.precompute else {}
model = AutoModelForCausalLM.from_pretrained(options.model)
for name, parameter in model.named_parameters():
    parameter.requires_grad = options.trained in name
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        options.output,
        beta=options.beta,
        num_train_epochs=1,
        per_device_train_batch_size=options.microbatch,
        gradient_accumulation_steps=options.batch // options.microbatch,
        gradient_checkpointing=False,
        bf16=False,
        report_to="none",
        **ahead,
    ),
    train_dataset=load_dataset("json", data_files=options.rows, split="train"),
)
trainer.train()
trainer.save_model()
