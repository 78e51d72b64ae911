"""`--dry-run`: the cost of a training, and no trace of it."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from programs import common, train

PRUNING = {"full": (), "importance": ("--infobatch", "--pruning.policy", "importance", "--pruning.budget", "0.6")}


@pytest.mark.parametrize(("program", "pruning"), [("train_diffusion.py", "importance"), ("train_mae.py", "full")])
def test_a_dry_run_says_what_the_run_costs_and_leaves_nothing(
    program: str, pruning: str, pictures: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The FLOPs of the run itself, to the digits that are shown: of whole batches, so that no step is a rounded one."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    settings = [*common(pictures, tmp_path / "run", 5), "--batch-size", "3", *PRUNING[pruning]]
    with pytest.raises(SystemExit) as ended:
        train(program, *settings, "--dry-run", "--tracker", "tensorboard")
    assert ended.value.code == 0
    assert not (tmp_path / "run").exists() and not [*(tmp_path / "temporary").iterdir()]
    shown = capsys.readouterr().out
    steps, seconds = re.search(r"([\d,]+) steps of (\S+) s", shown).groups()
    assert float(seconds) > 0 and " GB at most so far" in shown and "--infobatch  " in shown

    train(program, *settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert float(re.search(r"cost +(\S+) training FLOPs", shown)[1]) == pytest.approx(summary["train_flops"], rel=0.01)
    assert int(steps) == pytest.approx(summary["steps"], abs=5)  # the last step of an epoch is smaller or larger


def test_a_dry_run_ends_by_a_signal_without_a_trace(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """As an ordinary program does: with 128 and the signal's number, not with the status that asks for a resume."""
    from pretrain.training import loop

    step = loop.optimizer_step
    monkeypatch.setattr(loop, "optimizer_step", lambda *given: (os.kill(os.getpid(), signal.SIGTERM), step(*given)))
    with pytest.raises(SystemExit) as ended:
        train("train_diffusion.py", *common(pictures, tmp_path / "run", 5), "--dry-run")
    assert ended.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("accelerate", [False, True], ids=("torchrun", "accelerate launch"))
def test_a_dry_run_on_two_processes_is_of_the_whole(
    accelerate: bool, pictures: Path, tmp_path: Path, capsys, monkeypatch, program
) -> None:
    """Everything is printed once, with the steps and FLOPs of one process; nothing of it stays."""
    settings = [*common(pictures, tmp_path / "run", 5), "--batch-size", "4", *PRUNING["importance"], "--dry-run"]
    with pytest.raises(SystemExit):
        train("train_diffusion.py", *settings)
    alone = capsys.readouterr().out
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    shown = program("train_diffusion.py", *settings, processes=2, accelerate=accelerate, cwd=tmp_path).stdout
    assert "2 processes on cpu" in shown and "in the first of 2 processes, on cpu" in shown
    first = [[line.split()[0] for line in text.splitlines() if line] for text in (shown, alone)]
    assert first[0] == first[1]
    for pattern in (r"([\d,]+) steps of", r"cost +(\S+) training FLOPs", r"(\d+) images to train on"):
        assert re.findall(pattern, shown) == re.findall(pattern, alone) != []
    left = {path.name.partition("_")[0] for path in (tmp_path / "temporary").iterdir()}
    assert left <= {"torchelastic", "torchinductor"}  # of the launcher and of torch
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
