"""The README's own commands on the images that ship with the package; minutes each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def run(script: str, folder: Path) -> dict:
    command = [sys.executable, ROOT / script, "--infobatch", "--output-dir", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=1500)
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_diffusion_recipe(tmp_path: Path) -> None:
    summary = run("train_diffusion.py", tmp_path / "run")
    assert summary["dataset_size"] == 6000 and summary["saved_fraction"] > 0.1
    assert summary["quality"]["heldout_loss"] < 0.3 < summary["quality_before"]["heldout_loss"]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_mae_recipe(tmp_path: Path) -> None:
    summary = run("train_mae.py", tmp_path / "run")
    assert summary["dataset_size"] == 6000 and summary["saved_fraction"] > 0.1
    assert summary["quality"]["knn_accuracy"] > summary["quality_before"]["knn_accuracy"] + 0.08
