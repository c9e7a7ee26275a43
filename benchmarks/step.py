"""The preference step beside TRL's: the same rows, the same weights, in turns."""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import Case, Reference, Side
from benchmarks.flops import Products, Trained, matmul_rates
from benchmarks.turns import in_turns, one_by_one
from benchmarks.workload import MISTRAL_7B, PROFILES, SMALL, Shape, lengths, write_model, write_rows
from bfpo_exp.progress import progress

BATCH = 8  # pairs a step
# Pairs a forward pass on a CPU: ours has no padding to save, and for TRL one is the fastest (`tuning`).
MICROBATCH: dict[Side, int] = {"ours": BATCH, "trl": 1}
UNTUNED = 8  # TRL's own default of per_device_train_batch_size
SIDES: tuple[Side, Side] = ("ours", "trl")
REFERENCES: tuple[Reference, ...] = ("live", "cached")
TRAINED: tuple[Trained, ...] = ("all", "mlp.down_proj")
# How far the two sides' loss and gradient norm of a step may lie apart, relatively, by dtype.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        shape: of the model.
        steps: of a repetition, by profile; the shorter the pairs, the more.
        duels: profile, trained weights and reference of each comparison.
        untuned: profile and trained weights with which TRL is also measured as it is without tuning.
        warmup, repetitions: steps before, and how often each side then does its steps in turn.
    """

    shape: Shape
    steps: dict[str, int]
    duels: list[tuple[str, Trained, Reference]]
    untuned: list[tuple[str, Trained]]
    warmup: int = 2
    repetitions: int = 3


SHORT, USUAL, LONG = PROFILES
FULL = Plan(
    SMALL,
    steps={SHORT: 4, USUAL: 1, LONG: 1},
    duels=[
        duel
        for duel in itertools.product((SHORT, USUAL, LONG), TRAINED, REFERENCES)
        if duel[0] == USUAL or duel[1:] != ("mlp.down_proj", "live")  # it would take minutes more
    ],
    untuned=[(SHORT, "all"), (USUAL, "all"), (USUAL, "mlp.down_proj")],
)
QUICK = replace(
    FULL,
    steps={SHORT: 1},
    duels=[(SHORT, "all", "cached")],
    untuned=[(SHORT, "all")],
    warmup=1,
    repetitions=2,
)
GPU = Plan(
    MISTRAL_7B,
    steps={SHORT: 4, USUAL: 4},
    duels=list(itertools.product((SHORT, USUAL), TRAINED[1:], REFERENCES)),
    untuned=[],
)


def measure(plan: Plan, threads: int) -> dict[str, Any]:
    """Both sides of every comparison, ours first, and the rates of matrix products by profile."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, progress("steps beside TRL", len(plan.duels)) as advance:
        folder = Path(name)
        prepared(plan, folder)
        rates = {profile: _rates(plan, profile, threads) for profile in plan.steps}
        for profile, trained, reference in plan.duels:
            cases = [case_of(plan, folder, profile, side, trained, reference, threads) for side in SIDES]
            ours, trl = one_by_one(cases) if plan.shape.device == "cuda" else in_turns(cases)
            agree(ours, trl, TOLERANCES[plan.shape.dtype])
            rows += [{"profile": profile, **ours}, {"profile": profile, **trl}]
            speeds = [f"{row['side']} {median(row['pairs_per_second']):.2f}" for row in (ours, trl)]
            print(f"{profile}, {trained}, {reference}: {', '.join(speeds)} pairs/s", flush=True)
            advance(1)
    return {
        "batch": BATCH,
        "threads": threads,
        "shape": plan.shape.fields,
        "dtype": plan.shape.dtype,
        "rates": rates,
        "rows": rows,
    }


def measure_defaults(plan: Plan, threads: int) -> dict[str, Any]:
    """Both sides as their users find them: we cache the reference, TRL holds it and pads 8 pairs together."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, progress("defaults", len(plan.untuned)) as advance:
        folder = Path(name)
        prepared(plan, folder)
        for profile, trained in plan.untuned:
            ours = case_of(plan, folder, profile, "ours", trained, "cached", threads)
            trl = case_of(plan, folder, profile, "trl", trained, "live", threads)
            one, other = in_turns([ours, replace(trl, microbatch=UNTUNED)])
            agree(one, other, TOLERANCES[plan.shape.dtype])
            rows += [{"profile": profile, **row} for row in (one, other)]
            advance(1)
    return {"batch": BATCH, "threads": threads, "rows": rows}


def prepared(plan: Plan, folder: Path) -> None:
    """The model and the rows of each profile, on disk."""
    write_model(folder / "model", plan.shape)
    for profile, steps in plan.steps.items():
        write_rows(_rows(folder, profile), PROFILES[profile], BATCH * steps, plan.shape.fields["vocab_size"])


def _rows(folder: Path, profile: str) -> Path:
    return folder / f"{profile}.jsonl"


def case_of(
    plan: Plan,
    folder: Path,
    profile: str,
    side: Side,
    trained: Trained,
    reference: Reference,
    threads: int,
) -> Case:
    """One side of a comparison, on what `prepared` wrote."""
    return Case(
        side=side,
        reference=reference,
        trained=trained,
        model=str(folder / "model"),
        dtype=plan.shape.dtype,
        rows=str(_rows(folder, profile)),
        batch=BATCH,
        microbatch=MICROBATCH[side],
        warmup=plan.warmup,
        steps=plan.steps[profile],
        repetitions=plan.repetitions,
        threads=threads,
    )


def agree(ours: dict[str, Any], trl: dict[str, Any], tolerance: float) -> None:
    """Both sides computed the same training, or there is nothing to compare."""
    for what in ("losses", "gradient_norms"):
        for step, (one, other) in enumerate(zip(ours[what], trl[what], strict=True), start=1):
            if not math.isclose(one, other, rel_tol=tolerance):
                raise SystemExit(
                    f"step {step} of {ours['trained']}, {ours['reference']}: the sides' {what} are {one} and "
                    f"{other} (TRL's), more than {tolerance} apart: they do not do the same"
                )


def _rates(plan: Plan, profile: str, threads: int) -> dict[str, float]:
    """Those of matrix products for a batch of the profile."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(threads)
    products = Products.of(AutoConfig.for_model(**plan.shape.fields))
    batch = [(prompt, w, l) for prompt, w, l in lengths(PROFILES[profile], BATCH, seed=0).tolist()]  # noqa: E741
    return matmul_rates(products, batch, plan.shape.dtype, plan.shape.device)
