"""What training needs in memory, of a model of Mistral-7B's shape; docs/engine.md has a CPU's figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a model of 7 billion weights needs a CUDA device")
def test_selected_layers_need_less_than_a_second_model(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(BENCHMARK), "--shape", "mistral-7b"],
        env={**os.environ, "BFPO_EXP_HOME": str(tmp_path)},
        check=True,
    )
    cases = json.loads((tmp_path / "memory.json").read_text())["mistral-7b"]
    # Full training with a second model may be more than the device has: then its peak is None.
    peaks = {(c["reference"], c["checkpointing"]): c["peak_gb"] or float("inf") for c in cases}
    assert peaks["cached", True] < peaks["cached", False]
    assert peaks["cached", True] < peaks["second", True]
