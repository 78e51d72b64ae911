"""Runs whose data change, or whose loader workers are lost."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import PRUNED, draw_images, read_metrics
from PIL import Image
from programs import common, refused, same, train
from torch.optim import AdamW

from pretrain.config.schema import Data
from pretrain.data.images import Images
from pretrain.data.sources import Source, open_data


def source(folder: Path, **settings) -> Source:
    return open_data(Data(source=str(folder), **settings), seed=0)


def images(folder: Path, **settings) -> Images:
    return source(folder, **settings).train


def test_a_run_is_not_resumed_on_other_images(finished: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    shutil.copytree(finished, tmp_path / "run")
    victim = sorted((tmp_path / "data").rglob("*.png"))[20]
    Image.new("L", (12, 12), 7).save(victim)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    words = ["--resume", "--output-dir", tmp_path / "run", "--data", tmp_path / "data"]
    sentence = refused("train_diffusion.py", *words)
    assert "the data set has changed: " in sentence and victim.name in sentence
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after


BAD = {
    "truncated": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "no image": lambda good: b"%PDF-1.4 of no use",
    "bomb": lambda good: b"P5 30000 30000 255\n",
    "vanished": None,
}


def test_unreadable_images_of_all_kinds_in_one_run(tmp_path: Path) -> None:
    """They vanish and break after the data set was opened; valid images of rare kinds are read."""
    folder = draw_images(tmp_path / "images", 47)
    every = sorted(folder.rglob("*.png"))
    grey = Image.new("L", (12, 12), 90)
    grey.save(every[1], format="JPEG")  # a wrong extension
    Image.new("I;16", (12, 12), 300).save(every[3], format="PNG")
    Image.new("CMYK", (12, 12), (0, 0, 0, 90)).save(every[5], format="TIFF")
    grey.save(every[7], format="GIF", save_all=True, append_images=[Image.new("L", (12, 12), 10)])
    for victim, spoil in zip(every[11::3], BAD.values(), strict=False):
        victim.write_bytes(spoil(victim.read_bytes())) if spoil else victim.unlink()
    words = [
        *common(folder, tmp_path / "run", 2),
        "--on-bad-image",
        "skip",
        "--data.channels",
        1,
        "--data.pages",
        "first",
    ]
    train("train_diffusion.py", *words)
    bad = json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"]
    named = [victim for victim in every if any(str(victim) in line for line in bad)]
    assert len(bad) == len(named) == 4 and {*named} <= {
        *every[11::3]
    }  # the fifth was removed before the data set was opened


@pytest.mark.usefixtures("default_sigchld")
@pytest.mark.parametrize("number", [2, 3])
def test_a_run_with_a_lost_worker_is_the_same_run(
    number: int, pictures: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    """In the first epoch, and at its last step, so that the next epoch finds it dead."""
    step, calls, before = AdamW.step, [0], {*multiprocessing.active_children()}

    def stepped(self, *arguments, **more):
        calls[0] += 1
        if calls[0] == number:
            (worker,) = {*multiprocessing.active_children()} - before
            os.kill(worker.pid or 0, signal.SIGKILL)
        return step(self, *arguments, **more)

    monkeypatch.setattr(AdamW, "step", stepped)
    monkeypatch.setattr("pretrain.data.image_cache.MAX_HOST_BYTES", 0)  # read at every use
    words = [*common(pictures, tmp_path / "run"), *PRUNED, "--micro-batch", 6, "--data.workers", 1]
    train("train_diffusion.py", *words)
    assert same(finished, tmp_path / "run") and read_metrics(finished) == read_metrics(tmp_path / "run")
