"""A sweep from end to end, beside as many runs of TRL: what a user waits for.

Everything counts: start and imports, reading and tokenising the rows, the reference, the steps, saving and
(on our side) MLflow.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.step import BATCH, MICROBATCH, SHORT
from benchmarks.worker import ROOT, Failed, environment
from benchmarks.workload import PROFILES, SMALL, write_model, write_rows
from bfpo_exp.progress import progress

CONFIGS = Path(__file__).parent / "conf"
BETAS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.75, 1.0]
ALPHAS = [0.0, 0.25, 0.5, 0.75]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        steps: of a run, one pass over the rows.
        sweeps: our sweeps, by name: the words of the command line that make them.
        runs: of each of TRL's sweeps.
        timed: runs of TRL that are done; the other ones take what those after the first took.
    """

    steps: int
    sweeps: dict[str, list[str]]
    runs: int
    timed: int


def dpo(runs: int) -> list[str]:
    """A sweep of DPO over the first betas."""
    return ["loss=dpo", f"loss.beta={','.join(map(str, BETAS[:runs]))}"]


BFPO = ["loss=bfpo", f"loss.alpha={','.join(map(str, ALPHAS))}", "loss.beta=0.1,0.2,0.5"]
FULL = Plan(
    20,
    {"dpo, 1 run": dpo(1), "dpo, 4 runs": dpo(4), "dpo, 12 runs": dpo(12), "bfpo, 12 runs": BFPO},
    runs=12,
    timed=2,
)
QUICK = Plan(2, {"dpo, 2 runs": dpo(2)}, runs=2, timed=1)


def measure(plan: Plan) -> dict[str, Any]:
    """Seconds of our sweeps, and of TRL's runs one after another."""
    ours: dict[str, float] = {}
    trl: dict[str, list[float]] = {"live": [], "cached": []}
    total = len(plan.sweeps) + plan.timed * len(trl)
    with tempfile.TemporaryDirectory() as name, progress("sweeps beside TRL's runs", total) as advance:
        folder = Path(name)
        prepare(folder, plan.steps)
        for sweep, words in plan.sweeps.items():
            ours[sweep] = our_sweep(folder, words)
            advance(1)
        for run in range(plan.timed):
            for reference, seconds in trl.items():
                seconds.append(trl_run(folder, BETAS[run], reference))
                advance(1)
    return {"steps": plan.steps, "batch": BATCH, "ours": ours, "trl": trl, "trl_runs": plan.runs}


def prepare(folder: Path, steps: int) -> None:
    """The model and the rows, in a file for each side."""
    write_model(folder / "model", SMALL)
    rows = folder / "rows.jsonl"
    write_rows(rows, PROFILES[SHORT], BATCH * steps, SMALL.fields["vocab_size"])
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    with (folder / "conversations.jsonl").open("w") as out:
        for line in rows.read_text().splitlines():
            row = json.loads(line)
            turns = {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
            out.write(json.dumps(turns) + "\n")


def our_sweep(folder: Path, words: list[str]) -> float:
    """Seconds of the command, with an empty runs root."""
    common = [
        "stages=[reference,preference]",
        "data=benchmark",
        f"data.pairs.rows.files=[{folder / 'rows.jsonl'}]",
        "model=hf",
        f"model.path={folder / 'model'}",
        "train.trainable=all",
        "train.steps=null",
        "train.epochs=1",
        f"train.batch={BATCH}",
        f"train.microbatch={MICROBATCH['ours']}",
    ]
    with tempfile.TemporaryDirectory(dir=folder) as home:
        command = [sys.executable, "-m", "bfpo_exp", "-m", "--config-dir", str(CONFIGS), *common, *words]
        return seconds_of(command, environment(BFPO_EXP_HOME=home))


def trl_run(folder: Path, beta: float, reference: str) -> float:
    """Seconds of one run of TRL; all runs with the reference ahead share a cache of data sets."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [
            sys.executable, str(Path(__file__).with_name("trl_dpo.py")),
            "--model", str(folder / "model"), "--rows", str(folder / "conversations.jsonl"),
            "--output", output, "--beta", str(beta), "--batch", str(BATCH),
            "--microbatch", str(MICROBATCH["trl"]),
            *(["--precompute"] if reference == "cached" else []),
        ]  # fmt: skip
        return seconds_of(command, environment(HF_DATASETS_CACHE=str(folder / f"cache-{reference}")))


def seconds_of(command: list[str], variables: dict[str, str]) -> float:
    """How long a command takes; `Failed` if it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise Failed(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return time.perf_counter() - started
