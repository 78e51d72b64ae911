"""Data that changes under a run, and workers that read it no more."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PRUNED, draw_images, journal
from PIL import Image
from programs import common, refused, same, train
from torch.optim import AdamW
from torch.utils.data import DataLoader

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data import loader
from pretrain.data.fingerprint import describe_changes, fingerprints
from pretrain.data.images import Images
from pretrain.data.loader import EpochSampler, RestartingLoader, make_loader
from pretrain.data.sources import Source, open_data
from pretrain.infobatch.sampler import InfoBatch


def source(folder: Path, **settings) -> Source:
    return open_data(Data(source=str(folder), **settings), seed=0)


def images(folder: Path, **settings) -> Images:
    return source(folder, **settings).train


# What is done to a data set, and what is said of it.
CHANGES = {
    "touched": (lambda victim: os.utime(victim, (0, 0)), ""),
    "removed": (lambda victim: victim.unlink(), "36 images then, 35 now|gone or changed"),
    "added": (lambda victim: shutil.copy(victim, victim.with_name("zzz.png")), "new or changed, the first: "),
    "renamed": (
        lambda victim: victim.rename(victim.with_name("zzz.png")),
        "are new or changed, the first: ",
    ),
    "relabelled": (lambda victim: victim.rename(victim.parents[1] / "class 0" / victim.name), "new or changed"),
    "replaced": (lambda victim: Image.new("L", (12, 12), 9).save(victim), "are new or changed, the first: "),
    "one bit": (lambda victim: victim.write_bytes(victim.read_bytes()[:-1] + b"x"), "are new or changed"),
}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_said(change: str, held_out: bool, tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "images", 40)
    before = source(folder)
    part = before.test if held_out else before.train
    victim = next(name for name in map(part.name_of, range(len(part))) if "class 1" in name)
    marks = fingerprints(before)
    act, said = CHANGES[change]
    act(Path(victim))
    now = source(folder)
    sentence = describe_changes(marks, fingerprints(now), now)
    assert bool(sentence) == bool(said)
    assert re.search(said, sentence)


def test_a_moved_data_set_is_the_same_one(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "images", 24)
    marks = fingerprints(source(folder))
    moved = source(shutil.move(folder, tmp_path / "elsewhere"))
    assert describe_changes(marks, fingerprints(moved), moved) == ""


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


def test_bad_images_of_all_kinds_in_one_run(tmp_path: Path) -> None:
    """They vanish and break after the data set was looked at; good ones of rare kinds are read."""
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
    assert len(bad) == len(named) == 4 and {*named} <= {*every[11::3]}  # the fifth was never there


# -- workers ---------------------------------------------------------------------------------------


def visited(batches, infobatch: InfoBatch, harm=lambda: None) -> list[int]:
    seen: list[int] = []
    for _ in infobatch.epochs():
        for batch, _ in batches:
            seen += batch.index.tolist()
            infobatch(batch.image.float().mean((1, 2, 3)), batch.index)
            if len(seen) == 16:
                harm()
    return seen


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_is_killed_or_stopped(number: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loader, "BATCH_TIMEOUT", 1.0 if number == signal.SIGSTOP else 60.0)
    data = images(draw_images(tmp_path, 90), workers=2)
    expected = visited(make_loader(images(tmp_path), EpochSampler(whole := InfoBatch(len(data), epochs=2)), 8), whole)
    before, told = {*multiprocessing.active_children()}, []

    def harm() -> None:
        for worker in {*multiprocessing.active_children()} - before:
            os.kill(worker.pid or 0, number)

    infobatch = InfoBatch(len(data), epochs=2)
    batches = RestartingLoader(lambda: make_loader(data, EpochSampler(infobatch), 8), told.append)
    assert visited(batches, infobatch, harm) == expected
    assert len(told) == 1 and "new ones continue with the same batch" in told[0]


class NoRoom:
    """A loader where /dev/shm is full: it has no room for the semaphores of its queues."""

    num_workers = 1

    def __iter__(self) -> Iterator[int]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_interrupt_while_workers_are_started_leaves_none() -> None:
    """They leave SIGTERM to the trainer: one that nobody ended would be waited for at the program's end, for ever."""

    class Starting(NoRoom):
        def __iter__(self) -> Iterator[int]:
            os.kill(os.getpid(), signal.SIGINT)  # the main thread leaves while this one goes on
            time.sleep(0.3)
            worker = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
            worker.start()
            started.append(worker)
            return iter([1])

    started: list[multiprocessing.Process] = []
    batches = RestartingLoader(Starting, lambda sentence: None)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt), batches:
        next(iter(batches))
    (worker,) = started
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


class Dying:
    """A data set that kills whoever reads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.slow
def test_workers_that_die_again_end_the_run() -> None:
    told: list[str] = []
    batches = RestartingLoader(lambda: DataLoader(Dying(), num_workers=1), told.append)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"lost twice for one batch .*exited unexpectedly"):
        next(iter(batches))
    assert len(told) == 1


def test_workers_that_can_not_be_started_end_the_run() -> None:
    batches = RestartingLoader(NoRoom, lambda sentence: None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"can't be started .*No space left on device.*more space in /dev/shm"):
        next(iter(batches))


def test_an_error_of_the_data_sets_own_is_passed_on() -> None:
    class Wrong(Dying):
        def __getitem__(self, index: int) -> int:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        next(iter(RestartingLoader(lambda: DataLoader(Wrong(), num_workers=0), lambda sentence: None)))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [2, 3])
def test_a_run_with_a_lost_worker_is_the_same_run(
    number: int, pictures: Path, finished: Path, tmp_path: Path, monkeypatch
) -> None:
    """In the first epoch, and at its last step: the next epoch finds it dead."""
    step, calls, before = AdamW.step, [0], {*multiprocessing.active_children()}

    def stepped(self, *arguments, **more):
        calls[0] += 1
        if calls[0] == number:
            (worker,) = {*multiprocessing.active_children()} - before
            os.kill(worker.pid or 0, signal.SIGKILL)
        return step(self, *arguments, **more)

    monkeypatch.setattr(AdamW, "step", stepped)
    monkeypatch.setattr("pretrain.data.image_cache.MAX_HOST_BYTES", 0)  # read at every visit
    words = [*common(pictures, tmp_path / "run"), *PRUNED, "--micro-batch", 6, "--data.workers", 1]
    train("train_diffusion.py", *words)
    assert same(finished, tmp_path / "run") and journal(finished) == journal(tmp_path / "run")
