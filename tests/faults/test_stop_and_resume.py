"""A run that is stopped or killed anywhere is resumed bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PRUNED, ROOT, read_metrics, tiny
from programs import common, final, refused, same, train, wait_for

from pretrain.checkpoint import storage
from tests.faults.trainers import HANGS, Trainers


def test_from_every_step_the_rest_is_bit_identical(finished: Path, tmp_path: Path) -> None:
    steps = sorted((finished / "checkpoints").iterdir())
    assert len(steps) >= 14
    for step in steps[:-1:5]:
        folder = tmp_path / step.name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copytree(step, folder / "checkpoints" / step.name)
        for name in ("config.yaml", "metrics.jsonl"):  # metrics.jsonl is ahead of the checkpoint, as after a kill
            shutil.copy(finished / name, folder / name)
        train("train_diffusion.py", "--resume", "--output-dir", folder)
        assert same(finished, folder), step
        assert read_metrics(finished) == read_metrics(folder), step


class Killed(BaseException):
    """An exception that nothing catches."""


@pytest.mark.parametrize("further", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_between_the_loss_and_the_optimizer_step(
    further: int, pictures: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    """Again and again, some steps further each time: the scores of the batch are in, its gradient is not."""
    step = torch.optim.AdamW.step
    steps = len(list((finished / "checkpoints").iterdir()))
    words = [*common(pictures, tmp_path / "run"), *PRUNED, "--micro-batch", 6, "--checkpoint.every", 1]

    def dying(calls: int):
        left = [calls]

        def call(self, *arguments, **more):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return step(self, *arguments, **more)

        return call

    reached = 0
    for calls in [further] * steps:
        monkeypatch.setattr(torch.optim.AdamW, "step", dying(calls))
        try:
            begun = (tmp_path / "run" / "checkpoints").is_dir()
            train("train_diffusion.py", *(["--resume", "--output-dir", tmp_path / "run"] if begun else words))
            break
        except Killed:
            reached += 1
    assert reached == (steps - 2) // further >= 4  # besides those of the steps there is a checkpoint of the start
    assert same(finished, tmp_path / "run") and read_metrics(finished) == read_metrics(tmp_path / "run")


def test_killed_and_resumed(pictures: Path, finished: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    words = [*common(pictures, folder), *PRUNED, "--micro-batch", 6, "--checkpoint.every", 1, "--data.workers", 1]
    with Trainers("train_diffusion.py", words, tmp_path / "out.txt") as trainers:
        trainers.until(lambda: storage.newest(folder / "checkpoints"))
        trainers.kill()
    assert not (folder / "summary.json").exists()
    train("train_diffusion.py", "--resume", "--output-dir", folder)
    assert "resuming from" in capsys.readouterr().out
    assert same(finished, folder) and read_metrics(finished) == read_metrics(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_writes_a_checkpoint_and_prints_the_resume_command(
    number: int, pictures: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    words = tiny("train_diffusion.py", *common(pictures, folder, 2000), "--data.workers", 1)
    words += ["--data.size", "12", "--data.crop", "0.5"]  # which workers crop
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_diffusion.py", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(read_metrics(folder)) > 2 if (folder / "metrics.jsonl").exists() else False, process)
    os.killpg(process.pid, number)  # as a terminal does: workers get it, too
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 75, out + err
    assert err == "" and f"stopped by {signal.Signals(number).name}" in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith(
        f"continue with: python {ROOT / 'train_diffusion.py'} --resume --output-dir {folder}"
    )
    records = read_metrics(folder)
    reached = records[-1]["epoch"] if records[-1]["kind"] == "epoch" else records[-2]["epoch"]
    train("train_diffusion.py", "--resume", "--output-dir", folder, "--epochs", reached + 1)
    assert "epochs 2000 -> " in capsys.readouterr().out and read_metrics(folder)[: len(records)] == records


def test_a_run_is_resumed_with_more_epochs(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train("train_diffusion.py", *common(pictures, folder, 2), *PRUNED, "--evaluate.at-start")
    train("train_diffusion.py", "--resume", "--output-dir", folder, "--epochs", 5)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["quality"]["validation_loss"] < summary["quality_before"]["validation_loss"]
    assert [record["epoch"] for record in read_metrics(folder) if record["kind"] == "epoch"] == [1, 2, 3, 4, 5]
    one, average = final(folder), final(folder, "ema")
    assert all((one[name] - average[name]).abs().max() < 0.1 for name in one)


def test_a_finished_run_is_not_resumed_with_settings_that_would_train_nothing(
    finished: Path, pictures: Path, tmp_path: Path, capsys
) -> None:
    """Its files still say how it was trained."""
    folder = shutil.copytree(finished, tmp_path / "run")
    before = (folder / "config.yaml").read_bytes()
    for flags in (["--pruning.policy", "full"], ["--optim.lr", 0.5], ["--batch-size", 6]):
        sentence = refused("train_diffusion.py", "--resume", "--output-dir", folder, *flags)
        assert "the run is finished, so nothing would be trained with" in sentence and "add --epochs" in sentence
        assert (folder / "config.yaml").read_bytes() == before
    train("train_diffusion.py", "--resume", "--output-dir", folder, "--evaluate.images", 2)
    assert "the run is finished; more epochs continue it, --epochs" in capsys.readouterr().out


def test_inside_an_epoch_a_run_is_not_resumed_with_another_plan(finished: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for step in sorted((folder / "checkpoints").iterdir())[6:]:  # the last one left lies in the second epoch
        shutil.rmtree(step)
    for change in (["--seed", 1], ["--pruning.prune-ratio", 0.9], ["--pruning.policy", "full"]):
        assert "whose plan would be another one now" in refused(
            "train_diffusion.py", "--resume", "--output-dir", folder, *change
        )


def test_accelerates_configuration_does_not_change_the_run(
    pictures: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train("train_diffusion.py", "--config", finished / "config.yaml", "--output-dir", tmp_path / "run")
    assert same(finished, tmp_path / "run")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "give --precision bf16" in refused("train_diffusion.py", *common(pictures, tmp_path / "other"))


def test_a_changed_optimizer_setting_holds_after_a_resume(pictures: Path, tmp_path: Path) -> None:
    train("train_diffusion.py", *common(pictures, tmp_path, 1))
    train("train_diffusion.py", "--resume", "--output-dir", tmp_path, "--epochs", 2, "--optim.weight-decay", 0.5)
    (newest,) = sorted(tmp_path.glob("checkpoints/*/state.json"))[-1:]
    assert {group["weight_decay"] for group in json.loads(newest.read_text())["optimizer"]} == {0.0, 0.5}
