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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import cores
from benchmarks.step import BATCH, MICROBATCH, SHORT, UNTUNED, USUAL
from benchmarks.worker import ROOT, Failed, environment
from benchmarks.workload import PROFILES, SMALL, write_model, write_rows
from bfpo_exp.progress import progress

CONFIGS = Path(__file__).parent / "conf"
TRAINED = "mlp.down_proj"
BETAS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.75, 1.0]
ALPHAS = [0.0, 0.25, 0.5, 0.75]


@dataclass(frozen=True)
class Way:
    """A way to do many runs with TRL.

    Attributes:
        microbatch: pairs a forward pass.
        ahead: the reference's log-probs are computed by the first run, and found by the others.
        together: runs at a time, each with its share of the cores.
    """

    name: str
    microbatch: int
    ahead: bool = False
    together: int = 1


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        profile: of the pairs.
        steps: of a run, one pass over the rows.
        sweeps: ours, by name: the words of the command line that make them.
        ways: of TRL.
        runs: of a sweep; of TRL's only the first ones are done, and the last of them stand for the rest.
    """

    profile: str
    steps: int
    sweeps: dict[str, list[str]]
    ways: list[Way]
    runs: int


def dpo(runs: int) -> list[str]:
    """A sweep of DPO over the first betas."""
    return ["loss=dpo", f"loss.beta={','.join(map(str, BETAS[:runs]))}"]


BFPO = ["loss=bfpo", f"loss.alpha={','.join(map(str, ALPHAS))}", "loss.beta=0.1,0.2,0.5"]
TUNED = MICROBATCH["trl"]
FULL = Plan(
    USUAL,
    steps=20,
    sweeps={"dpo, 1 run": dpo(1), "dpo, 12 runs": dpo(12), "bfpo, 12 runs": BFPO},
    ways=[
        Way("by default", UNTUNED),
        Way("tuned", TUNED),
        Way("tuned, reference ahead, as many at a time as cores", TUNED, ahead=True, together=cores()),
    ],
    runs=12,
)
QUICK = Plan(SHORT, 2, {"dpo, 2 runs": dpo(2)}, [Way("tuned, reference ahead", TUNED, ahead=True)], runs=2)


def measure(plan: Plan) -> dict[str, Any]:
    """Seconds of our sweeps, and of TRL's runs."""
    ours: dict[str, float] = {}
    theirs: list[dict[str, Any]] = []
    total = len(plan.sweeps) + len(plan.ways)
    with tempfile.TemporaryDirectory() as name, progress("sweeps beside TRL's runs", total) as advance:
        folder = Path(name)
        prepare(folder, plan)
        for sweep, words in plan.sweeps.items():
            ours[sweep] = our_sweep(folder, words)
            advance(1)
        for way in plan.ways:
            theirs.append({**asdict(way), **trl_sweep(folder, way, plan.runs)})
            advance(1)
    return {
        "profile": plan.profile,
        "trained": TRAINED,
        "steps": plan.steps,
        "batch": BATCH,
        "runs": plan.runs,
        "ours": ours,
        "trl": theirs,
    }


def prepare(folder: Path, plan: Plan) -> None:
    """The model and the rows, in a file for each side."""
    write_model(folder / "model", SMALL)
    rows = folder / "rows.jsonl"
    write_rows(rows, PROFILES[plan.profile], BATCH * plan.steps, SMALL.fields["vocab_size"])
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
        f"train.trainable=[{TRAINED}]",
        "train.steps=null",
        "train.epochs=1",
        f"train.batch={BATCH}",
        f"train.microbatch={MICROBATCH['ours']}",
    ]
    with tempfile.TemporaryDirectory(dir=folder) as home:
        command = [sys.executable, "-m", "bfpo_exp", "-m", "--config-dir", str(CONFIGS), *common, *words]
        return seconds_of(command, environment(BFPO_EXP_HOME=home))


def trl_sweep(folder: Path, way: Way, runs: int) -> dict[str, Any]:
    """Seconds of so many runs: ``timed`` those that were done, ``seconds`` all, most of which are not.

    Where the first run computes the reference for all, it is done alone.
    """
    first = [trl_run(folder, BETAS[0], way)] if way.ahead else []
    started = time.perf_counter()
    with ThreadPoolExecutor(way.together) as pool:
        list(pool.map(lambda beta: trl_run(folder, beta, way), BETAS[len(first) :][: way.together]))
    others = time.perf_counter() - started
    rounds = (runs - len(first)) / way.together
    return {"timed": [*first, others], "seconds": sum(first) + rounds * others}


def trl_run(folder: Path, beta: float, way: Way) -> float:
    """Seconds of one run of TRL; all runs of a way share a cache of data sets."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        command = [
            sys.executable, str(Path(__file__).with_name("trl_dpo.py")),
            "--model", str(folder / "model"), "--rows", str(folder / "conversations.jsonl"),
            "--output", output, "--beta", str(beta), "--trained", TRAINED, "--batch", str(BATCH),
            "--microbatch", str(way.microbatch), *(["--precompute"] if way.ahead else []),
        ]  # fmt: skip
        share = str(max(1, cores() // way.together))
        cache = str(folder / f"cache-{way.name}")
        return seconds_of(command, environment(HF_DATASETS_CACHE=cache, OMP_NUM_THREADS=share))


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
