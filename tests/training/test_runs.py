"""The files of a run, and settings that must not change it."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import PRUNED, read_metrics
from PIL import Image
from programs import PROGRAMS, common, final, same, train

from pretrain.checkpoint.load_run import load_run
from pretrain.training.optim import step_flops


@pytest.mark.parametrize("script", PROGRAMS)
@pytest.mark.parametrize("infobatch", [True, False])
def test_a_run_writes_its_files(script: str, infobatch: bool, pictures: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    train(script, *common(pictures, folder, 8), *((*PRUNED, "--evaluate.at-start") if infobatch else ()))
    printed = capsys.readouterr()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["policy"] == ("infobatch" if infobatch else "full")
    assert (summary["epochs"], summary["dataset_size"], summary["full_samples"]) == (8, 43, 8 * 43)
    assert summary["samples_used"] == summary["full_samples"] if not infobatch else summary["samples_used"] < 8 * 43
    assert summary["saved_fraction"] == pytest.approx(1 - summary["samples_used"] / (8 * 43))
    assert summary["adapter"] == {"train_diffusion.py": "ddpm", "train_mae.py": "mae"}[script]
    assert summary["seconds"] > 0 and summary["bad_images"] == []
    found = load_run(folder)
    per_step = step_flops(found.model, found.config.optim)
    assert (per_step > 0) == (script == "train_mae.py")  # by Muon
    of_samples = summary["train_flops"] - per_step * summary["steps"]
    of_full = summary["full_train_flops"] - per_step * 8 * 4  # of 12, 12, 12 and 7 images
    assert 0 < of_samples == of_full // summary["full_samples"] * summary["samples_used"]
    assert infobatch or summary["train_flops"] == summary["full_train_flops"]
    if infobatch:
        assert summary["quality"]["validation_loss"] < summary["quality_before"]["validation_loss"]
    else:
        assert summary["quality_before"] == {}
    epochs = [record for record in read_metrics(folder) if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == list(range(1, 9))
    assert epochs[-1]["samples_used"] == summary["samples_used"] and epochs[-1]["nominal_samples"] == 8 * 43
    assert epochs[-1]["skipped"] == 0 and epochs[0]["skipped"] == 0
    assert [record["epoch"] for record in read_metrics(folder) if record["kind"] == "evaluation"] == [
        *[0] * infobatch,
        2,
        4,
        6,
        8,
    ]
    drawn = {path.name for path in (folder / "pictures").iterdir()}
    charts = {"loss-by-level.png", "times-used.png"}
    assert drawn - charts == {f"epoch-000{n}.png" for n in (2, 4, 6, 8)} and ("times-used.png" in drawn) == infobatch
    for path in (folder / "pictures").iterdir():
        assert np.asarray(Image.open(path)).std() > 0
    for message in (
        "epoch 8/8",
        "samples",
        "of the full data set",
        "validation_loss",
        str(folder / "pictures"),
        str(folder / "model"),
    ):
        assert message in printed.out
    assert "\x1b" not in printed.out  # no terminal, no escapes
    written = (folder / "config.yaml").read_text()
    resolved = yaml.safe_load(written)
    assert f"torch {version('torch')}, torchvision" in written.splitlines()[0]
    assert resolved["infobatch"] is infobatch and resolved["epochs"] == 8
    if script == "train_mae.py" and infobatch:
        assert {"knn_accuracy"} <= summary["quality"].keys() & summary["quality_before"].keys()
        assert "knn_accuracy" in printed.out and "(before training" in printed.out


def test_a_budget_of_one_is_full_training(pictures: Path, tmp_path: Path) -> None:
    """Bit for bit."""
    train("train_diffusion.py", *common(pictures, tmp_path / "full"))
    train(
        "train_diffusion.py",
        *common(pictures, tmp_path / "zero"),
        "--pruning.policy",
        "importance",
        "--pruning.over",
        "samples",
        "--pruning.budget",
        1,
    )
    assert same(tmp_path / "full", tmp_path / "zero")
    assert read_metrics(tmp_path / "full") == read_metrics(tmp_path / "zero")


@pytest.mark.parametrize(("batch_size", "steps"), [(12, 4), (14, 3), (20, 2), (42, 1), (64, 1)])
def test_the_rest_of_an_epoch_is_a_step_if_it_is_half_a_batch(
    batch_size: int, steps: int, pictures: Path, tmp_path: Path
) -> None:
    """Of 43 images; also with micro-batches."""
    for more in ([], ["--micro-batch", 2 if batch_size < 64 else 16]):
        words = [*common(pictures, tmp_path / f"{len(more)}", 1), "--batch-size", batch_size, *more]
        train("train_diffusion.py", *words)
        summary = json.loads((tmp_path / f"{len(more)}" / "summary.json").read_text())
        assert (summary["steps"], summary["samples_used"]) == (steps, 43)


def test_the_learning_rate_of_a_single_step_is_not_zero(pictures: Path, tmp_path: Path) -> None:
    """A step has the learning rate of its middle: the first is not 0 by the warm-up, nor the last at the end."""
    train("train_diffusion.py", *common(pictures, tmp_path / "run", 1), "--batch-size", 43, "--optim.warmup", 0.5)
    (epoch,) = (record for record in read_metrics(tmp_path / "run") if record["kind"] == "epoch")
    assert epoch["lr"] == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optim"]["lr"]


@pytest.mark.parametrize(
    ("script", "over"), [("train_diffusion.py", "both"), ("train_diffusion.py", "levels"), ("train_mae.py", "samples")]
)
def test_a_budget_is_met_exactly(script: str, over: str, pictures: Path, tmp_path: Path) -> None:
    words = ["--pruning.policy", "importance", "--pruning.budget", 0.8, "--pruning.over", over]
    train(script, *common(pictures, tmp_path / "run", 6), *words, "--evaluate.at-start")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples_used"] == round(0.8 * 6 * 43) and summary["policy"] == "importance"
    assert summary["quality"]["validation_loss"] < summary["quality_before"]["validation_loss"]


def test_the_resolved_config_runs_again_to_the_same_end(finished: Path, tmp_path: Path) -> None:
    train("train_diffusion.py", "--config", finished / "config.yaml", "--output-dir", tmp_path / "again")
    assert same(finished, tmp_path / "again")
    assert read_metrics(finished) == read_metrics(tmp_path / "again")


def test_accumulated_micro_batches_are_the_batch(pictures: Path, finished: Path, tmp_path: Path) -> None:
    train("train_diffusion.py", *common(pictures, tmp_path / "whole"), *PRUNED)
    for name, value in final(finished).items():
        torch.testing.assert_close(value, final(tmp_path / "whole")[name], rtol=1e-4, atol=1e-5)


def test_a_tracker_gets_the_metrics(pictures: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("train_diffusion.py", *common(pictures, tmp_path / "run", 2), "--tracker", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "run"))
    events.Reload()
    assert {"loss", "skipped", "validation_loss"} <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("loss")]
    written = [record["loss"] for record in read_metrics(tmp_path / "run") if record["kind"] == "epoch"]
    assert logged == pytest.approx(written)
