"""What is installed: a light start, and a wheel that carries its configs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "mlflow", "datasets", "matplotlib", "pandas")


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "method=dpo"]])
def test_a_look_at_the_config_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules]))\n"
        f"sys.argv = ['bfpo-exp', *{arguments!r}]\n"
        "from bfpo_exp.app import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loss" in done.stdout
    assert done.stdout.rstrip().endswith("HEAVY []")


@pytest.mark.slow
def test_the_wheel_carries_configs_and_launchers(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    shipped = {f"bfpo_exp/{file.relative_to(ROOT)}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert shipped <= names
    assert "hydra_plugins/bfpo_exp_launchers/local.py" in names
    done = subprocess.run(
        [sys.executable, "-m", "bfpo_exp", "--cfg", "job", "experiment=smoke", "hydra/launcher=local"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "steps: 6" in done.stdout
