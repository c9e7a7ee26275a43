"""What the documentation shows is what works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from app_support import Command

from bfpo_exp.losses import LOSSES
from bfpo_exp.losses import registry as loss_registry

ADDING_A_LOSS = Path(__file__).resolve().parents[1] / "docs" / "adding-a-loss.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", ADDING_A_LOSS.read_text(), re.S)


@pytest.mark.slow
def test_the_documented_loss_runs(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loss_registry, "LOSSES", dict(LOSSES))
    exec(compile(blocks("python")[0], str(ADDING_A_LOSS), "exec", dont_inherit=True), {})
    spec = loss_registry.get_loss("sppo")
    h2 = {"policy_w": -1, "policy_l": -4, "ref_w": -2, "ref_l": -3}  # r_w = 1, r_l = -1
    given = {name: torch.tensor([float(value)]) for name, value in h2.items()}
    assert spec(given, {"beta": 0.25}).tolist() == [2.0]  # (1 - 2)^2 + (-1 + 2)^2

    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "sppo.yaml").write_text(blocks("yaml")[0])
    done = command("--config-dir", str(tmp_path / "conf"), "experiment=smoke", "loss=sppo", "loss.beta=0.5")
    assert done.code == 0, done.err
    (metrics,) = (tmp_path / "runs" / "run").glob("*/metrics.jsonl")
    assert '"train/loss": 2.0' in metrics.read_text()  # 2 (1 / (2 beta))^2 at policy == reference
