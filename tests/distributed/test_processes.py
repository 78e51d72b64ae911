"""Several processes are one run."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRUNED, ROOT, read_metrics
from PIL import Image
from programs import common, final, train, train_on


@pytest.mark.parametrize(
    ("processes", "accelerate"),
    [(3, False), *(pytest.param(2, launcher, marks=pytest.mark.slow) for launcher in (False, True))],
)
def test_several_processes_are_one_run(
    processes: int, accelerate: bool, pictures: Path, finished: Path, tmp_path: Path, program
) -> None:
    folder = tmp_path / "run"
    words = ["train_diffusion.py", *common(pictures, folder), *PRUNED, "--micro-batch", 2]
    if accelerate:
        output = program(*words, processes=processes, accelerate=True).stdout
    else:
        output = train_on(processes, tmp_path / "output.txt", *words)
    assert output.count("epoch 4/4") == 2  # only one rank prints: the epoch and its evaluation
    one, several = final(finished), final(folder)
    distance = sum((one[k] - several[k]).square().sum() for k in one).sqrt()
    assert distance / sum(v.square().sum() for v in one.values()).sqrt() < 1e-5
    a, b = final(finished, "infobatch"), final(folder, "infobatch")
    torch.testing.assert_close(a["score"], b["score"], rtol=1e-4, atol=1e-6)
    shown = [np.asarray(Image.open(run / "pictures" / "epoch-0004.png")).astype(int) for run in (finished, folder)]
    assert np.abs(shown[0] - shown[1]).max() <= 2  # of 255; generated in other batches, with other rounding
    for mine, theirs in zip(read_metrics(finished), read_metrics(folder), strict=True):
        assert {k: v for k, v in mine.items() if isinstance(v, int)} == {
            k: v for k, v in theirs.items() if isinstance(v, int)
        }
        assert mine.get("loss", 0) == pytest.approx(theirs.get("loss", 0), rel=1e-5)


def test_a_run_of_two_processes_is_resumed_by_one(pictures: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*common(pictures, folder), *PRUNED, "--checkpoint.every", 1, "--checkpoint.keep", 99]
    train_on(2, tmp_path / "output.txt", "train_diffusion.py", *words)
    for step in sorted((folder / "checkpoints").iterdir())[6:]:
        shutil.rmtree(step)
    train("train_diffusion.py", "--resume", "--output-dir", folder)
    for name, value in final(finished).items():
        torch.testing.assert_close(value, final(folder)[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_on_a_subset_with_weights_are_one_run(pictures: Path, tmp_path: Path) -> None:
    subset = {"indices": [*range(0, 40, 2)], "weights": [1 + n % 3 for n in range(20)]}
    (tmp_path / "subset.json").write_text(json.dumps(subset))
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, run in ((one, train), (two, partial(train_on, 2, tmp_path / "output.txt"))):
        words = [*common(pictures, folder, 2), "--data.subset", tmp_path / "subset.json", "--micro-batch", 6]
        run("train_diffusion.py", *words, *PRUNED, "--evaluate.metrics", "loss")
    for name, value in final(one).items():
        torch.testing.assert_close(value, final(two)[name], rtol=1e-3, atol=1e-5)
    losses = [[record["loss"] for record in read_metrics(run) if "loss" in record] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_skipped_images_of_all_processes_are_reported(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    every = sorted((tmp_path / "data").rglob("*.png"))
    for victim in every[5:11]:
        victim.write_bytes(b"")
    words = [*common(tmp_path / "data", tmp_path / "run", 1), "--on-bad-image", "skip"]
    train_on(2, tmp_path / "output.txt", "train_diffusion.py", *words)
    bad = json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"]
    assert len(bad) == 6 and all(any(str(victim) in line for line in bad) for victim in every[5:11])
    train("train_diffusion.py", "--resume", "--output-dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"] == bad


@pytest.mark.slow
def test_a_launch_that_starts_fewer_than_asked_for_is_stopped(pictures: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    words = [str(ROOT / "train_diffusion.py"), *map(str, common(pictures, tmp_path / "run"))]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: the launcher was asked for 2 processes and started 1" in done.stderr
    assert not (tmp_path / "run").exists()
