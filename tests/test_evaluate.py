"""`python -m pretrain.evaluate`: what a run is worth, measured again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, journal
from programs import common, train

from pretrain.errors import Refused
from pretrain.evaluate.__main__ import main


@pytest.fixture(scope="module")
def mae(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mae") / "run"
    train("train_mae.py", *common(pictures, folder, 2))
    return folder


@pytest.fixture(scope="module")
def flow(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow") / "run"
    train("train_diffusion.py", *common(pictures, folder, 2))
    return folder


def evaluate(run: Path, *words: object) -> dict:
    """What is found."""
    main([str(run), *map(str, words)])
    return json.loads((run / "evaluation.json").read_text())[-1]["found"]


def refused(run: Path, *words: object) -> str:
    with pytest.raises(Refused) as refusal:
        main([str(run), *map(str, words)])
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_what_was_measured_in_training_is_measured_again(mae: Path, flow: Path, capsys) -> None:
    for run in (mae, flow):
        last = [record for record in journal(run) if record["kind"] == "evaluation"][-1]
        assert evaluate(run) == {name: value for name, value in last.items() if name not in ("kind", "epoch")}
    assert "knn_accuracy" in capsys.readouterr().out
    record = json.loads((flow / "evaluation.json").read_text())[-1]
    assert record["command"] == f"python -m pretrain.evaluate {flow}" and record["step"] == 8


def test_metrics_are_those_of_the_objective(mae: Path, flow: Path) -> None:
    assert [*evaluate(mae, "--metrics", "knn")] == ["knn_accuracy"]
    assert refused(mae, "--metrics", "heldut").startswith("--metrics heldut: did you mean heldout? There are heldout, ")
    assert "a model of Flow has no encoder; of this run there are heldout" in refused(flow, "-m", "heldout,knn")


@pytest.mark.slow
def test_processes_together_find_what_one_finds(mae: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["-m", "pretrain.evaluate", str(mae), "--metrics", "heldout,knn"]
    subprocess.run([*launch, *words], cwd=ROOT, check=True, timeout=150)
    several = json.loads((mae / "evaluation.json").read_text())[-1]
    assert several["processes"] == 2
    assert several["found"] == evaluate(mae, "--metrics", "heldout,knn")
