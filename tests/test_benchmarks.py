"""The benchmarks: what they count, what they compare, and that the page shows what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_support import made_model
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """``benchmarks`` is a folder of the checkout, and no part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_page_shows_the_results() -> None:
    from benchmarks.report import PAGE, RESULTS, filled

    page = PAGE.read_text()
    assert filled(page, json.loads(RESULTS.read_text())) == page, "run: python -m benchmarks.report"


def test_a_block_is_made_anew_and_other_text_stays() -> None:
    from benchmarks.report import filled

    page = "before\n<!-- begin stages -->\nold\n<!-- end stages -->\nafter <!-- end sweep -->\n"
    seconds = {"base": {"first": 61.25, "again": 0.04}}
    machine = {
        "processor": "CPU", "cores": 2, "memory_gb": 24.9, "gpu": None, "python": "3.11",
        "packages": {"torch": "2.13"}, "date": "2026-11-21",
    }  # fmt: skip
    made = filled(page, {"stages": {"machine": machine, "seconds": seconds}})
    assert made.startswith("before\n<!-- begin stages -->\n*CPU, 2 cores, 25 GB; Python 3.11, torch 2.13; ")
    assert "| base | 61.2 | 0.0 |" in made
    assert made.endswith("<!-- end stages -->\nafter <!-- end sweep -->\n")
    assert "old" not in made
    assert filled(page, {}) == page.replace("old", "Not measured yet.")


@pytest.mark.parametrize("trained", ["all", "mlp.down_proj"])
def test_operations_are_those_that_torch_counts(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt with one response, and another one of a single token, which adds to the head alone.

    Plain attention multiplies all positions with all, so the count of causal attention is put aside.
    """
    from benchmarks.flops import Products
    from bfpo_exp.models.policy import select_trainable

    prompt, response = 20, 13
    model = made_model(num_hidden_layers=3, attn_implementation="eager")
    select_trainable(model, "all" if trained == "all" else [trained])
    length = prompt + response - 1
    predicting = [*range(prompt - 1, length), prompt - 1]

    with FlopCounterMode(display=False) as forward:
        hidden = model.model(input_ids=torch.arange(length)[None]).last_hidden_state
        logits = model.lm_head(hidden[0, predicting])
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()

    products = Products.of(model.config)
    monkeypatch.setattr(Products, "_attention", lambda self, pair: 4 * self.heads * length**2)
    pair = (prompt, response, 1)
    assert forward.get_total_flops() == products.forward(pair)
    assert backward.get_total_flops() == products.backward(pair, trained)  # type: ignore[arg-type]


def test_causal_attention_is_counted_pair_by_pair_of_tokens() -> None:
    """A token sees itself, what is before it in its response, and the prompt; the heads are 4 wide."""
    from benchmarks.flops import Products

    prompt, first, second = 3, 4, 2
    seen = sum(range(1, prompt + 1))
    seen += sum(prompt + i for length in (first, second) for i in range(1, length))
    products = Products(((4, 4),) * 4, ((4, 8),) * 2, (8, 4), (4, 16), heads=4, blocks=1)
    assert products._attention((prompt, first, second)) == 2 * 2 * 4 * seen


def test_rows_have_the_lengths_of_their_profile(tmp_path: Path) -> None:
    from benchmarks.workload import MAX_LENGTH, PROFILES, lengths

    for profile in PROFILES.values():
        found = lengths(profile, 64, seed=1)
        assert np.median(found[:, 0]) == pytest.approx(profile.prompt, rel=0.1)
        assert np.median(found[:, 1:]) == pytest.approx(profile.response, rel=0.15)
        assert (found[:, :1] + found[:, 1:]).max() <= MAX_LENGTH
        assert found.min() >= 2


def test_sides_that_differ_are_refused() -> None:
    from benchmarks.step import agree

    row = {"trained": "all", "reference": "live", "losses": [0.7, 0.6], "gradient_norms": [3.0, 2.0]}
    agree(row, {**row, "losses": [0.7, 0.60001]}, 1e-4)
    with pytest.raises(SystemExit, match=r"step 2 .* losses are 0.6 and 0.61"):
        agree(row, {**row, "losses": [0.7, 0.61]}, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["step", "sweep", "scaling"])
def test_a_part_runs(part: str, tmp_path: Path) -> None:
    from benchmarks.plot import draw
    from benchmarks.sheets import SHEETS

    results = tmp_path / "results.json"
    words = [sys.executable, "-m", "benchmarks", "--quick", "--only", part, "--output", str(results)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    section = json.loads(results.read_text())[part]
    for sheet in SHEETS[part]:
        assert sheet(section).rows
        assert sheet(section).title in done.stdout
    if part == "step":
        sides = {row["side"]: row for row in section["rows"]}
        assert sides.keys() == {"ours", "trl"}
        assert all(min(row["pairs_per_second"]) > 0 for row in sides.values())
        draw(section, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
