"""Peak memory of preference training: what is trained, where the reference comes from, what is kept.

``python benchmarks/memory.py`` measures every case in a process of its own, on a Llama of 100M random
weights; where there is a GPU, on one of Mistral-7B's shape in bfloat16 too.  It prints a table, and
writes ``memory.json`` into the runs root.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from bfpo_exp.data.pairs import TokenisedPairs
    from bfpo_exp.logprobs.paths import LogpsPath
    from bfpo_exp.logprobs.reference import PairLogps
    from bfpo_exp.train.live_reference import Reference

STEPS = 2  # the optimiser's state is there from the end of the first
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Shape:
    """A random model, and the batch that it is trained on.

    Attributes:
        fields: of the transformers config.
        pairs: a step, in one micro-batch.
        tokens: of a prompt, and of each response.
        gpu: whether a GPU is needed.
    """

    fields: dict[str, Any]
    dtype: str
    pairs: int
    tokens: int
    gpu: bool


SHAPES = {
    "llama-100m": Shape(
        {
            "model_type": "llama",
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "vocab_size": 16000,
            "tie_word_embeddings": True,
        },
        dtype="float32",
        pairs=4,
        tokens=128,
        gpu=False,
    ),
    "mistral-7b": Shape(
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
        dtype="bfloat16",
        pairs=2,
        tokens=256,
        gpu=True,
    ),
}


@dataclass(frozen=True)
class Case:
    """What is trained, against which reference; ``second`` is a whole second model."""

    trainable: str
    reference: str
    checkpointing: bool

    @property
    def settings(self) -> list[str]:
        """The words of a command line that ask for it."""
        return [
            f"train.trainable={self.trainable}",
            f"train.gradient_checkpointing={str(self.checkpointing).lower()}",
        ]


CASES = [
    Case(trainable, reference, checkpointing)
    for trainable, reference in (
        ("[mlp.down_proj]", "cached"),
        ("[mlp.down_proj]", "live"),
        ("all", "second"),
    )
    for checkpointing in (False, True)
]


def main() -> None:
    """Measure all cases of the shapes that this machine can hold; or, in a child, one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="one shape alone")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(SHAPES[arguments.shape], CASES[arguments.case])))
        return
    # Not from torch, whose memory a child would start with.
    gpu = subprocess.run(
        [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"], check=False
    )
    found = {}
    for name, shape in SHAPES.items():
        if arguments.shape not in (None, name):
            continue
        if shape.gpu and gpu.returncode:
            print(f"{name}: left out, there is no GPU")
            continue
        found[name] = [measured_apart(name, i) for i in range(len(CASES))]
        Console().print(table(name, found[name]))
    from bfpo_exp.paths import home

    path = Path(home()) / "memory.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1))
    print(f"written to {path}")


def measured_apart(shape: str, case: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    words = [sys.executable, __file__, "--shape", shape, "--case", str(case)]
    # Large blocks go back to the system when they are freed: what counts is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"case {case} of {shape} failed")
    return json.loads(done.stdout.splitlines()[-1])


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    """The cases of one shape; the last column is the share of full training's peak."""
    shape, full = SHAPES[name], next(row for row in rows if row["reference"] == "second")
    title = (
        f"{name}, {shape.dtype}, {shape.pairs} pairs of {2 * shape.tokens} tokens a step, {rows[0]['device']}"
    )
    made = Table("trained", "reference", "checkpointing", "peak GB", "s/step", "of full", title=title)
    for row in rows:
        peak, of = row["peak_gb"], full["peak_gb"]
        numbers = [OUT_OF_MEMORY, "", ""]
        if peak is not None:
            numbers = [f"{peak:.2f}", f"{row['seconds']:.1f}", f"{peak / of:.0%}" if of is not None else ""]
        made.add_row(escape(row["trainable"]), row["reference"], str(row["checkpointing"]).lower(), *numbers)
    return made


def measure(shape: Shape, case: Case) -> dict[str, Any]:
    """Take a few steps; peak memory in GB (1e9) beyond that of the process without a model."""
    import torch

    from bfpo_exp.runtime import before_compute

    before_compute(threads=1)
    device = torch.device("cuda" if shape.gpu else "cpu")
    row = {**asdict(case), "device": torch.cuda.get_device_name() if shape.gpu else "CPU, 1 thread"}
    try:
        return {**row, **trained(shape, case, device)}
    except torch.cuda.OutOfMemoryError:
        return {**row, "peak_gb": None, "seconds": None}


def trained(shape: Shape, case: Case, device: torch.device) -> dict[str, float]:
    """The case's training itself, on the parts that a run uses."""
    import torch
    from hydra import compose, initialize_config_dir
    from transformers import AutoConfig, AutoModelForCausalLM

    from bfpo_exp.config.check import checked
    from bfpo_exp.logprobs.paths import chosen_path
    from bfpo_exp.models.policy import select_trainable
    from bfpo_exp.paths import config_dir
    from bfpo_exp.train.engine import PlainEngine
    from bfpo_exp.train.loop import train
    from bfpo_exp.train.preference import PreferenceObjective
    from bfpo_exp.train.prepare import prepare_for_training

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        sizes = [f"train.batch={shape.pairs}", f"train.microbatch={shape.pairs}", f"train.steps={STEPS}"]
        words = ["data.batches=shuffle", f"model.dtype={shape.dtype}", *sizes, *case.settings]
        config = checked(compose("config", words))
    before = resident_bytes("VmRSS")
    with device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shape.fields), dtype=getattr(torch, shape.dtype)
        ).eval()
    parameters = select_trainable(model, config.train.trainable)
    prepare_for_training(model, config.train)
    pairs = random_pairs(shape)
    path = chosen_path(config.model, 2 * shape.tokens)
    objective = PreferenceObjective(pairs, reference_of(case, model, path, len(pairs)), config, device)
    engine = PlainEngine(model, parameters, config.train, STEPS)
    ends: list[float] = []
    with path.during(model):
        train(engine, objective, STEPS, 1, lambda step, values: ends.append(time.perf_counter()))
    peak = torch.cuda.max_memory_allocated() if shape.gpu else resident_bytes("VmHWM") - before
    return {"peak_gb": peak / 1e9, "seconds": ends[-1] - ends[-2]}


def reference_of(case: Case, model: PreTrainedModel, path: LogpsPath, pairs: int) -> PairLogps | Reference:
    """The case's reference; cached log-probs are zeros here, as their values need no memory."""
    import numpy as np

    from bfpo_exp.logprobs.reference import PairLogps
    from bfpo_exp.train.live_reference import LiveReference, live_reference

    if case.reference == "cached":
        nothing = np.zeros(pairs, np.float32)
        return PairLogps(nothing, nothing, nothing + 1, nothing + 1)
    if case.reference == "live":
        return live_reference(model, path)
    return LiveReference(copy.deepcopy(model).requires_grad_(False), [], path)


def random_pairs(shape: Shape) -> TokenisedPairs:
    """As many pairs as a step takes, of random tokens."""
    import numpy as np

    from bfpo_exp.data.pairs import TokenisedPairs

    rng, n = np.random.default_rng(0), shape.pairs

    def texts() -> list[list[int]]:
        return rng.integers(3, shape.fields["vocab_size"], (n, shape.tokens)).tolist()

    return TokenisedPairs(
        prompt_ids=texts(),
        w_ids=texts(),
        l_ids=texts(),
        safe_w=np.ones(n, np.float32),
        safe_l=np.zeros(n, np.float32),
        safer=np.ones(n, np.int8),
        ordered=np.ones(n, bool),
        stream=np.zeros(n, np.int8),
    )


def resident_bytes(which: str) -> int:
    """``VmRSS``, what of this process is in memory now, or ``VmHWM``, its peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{which}:")[1].split()[0])


if __name__ == "__main__":
    main()
