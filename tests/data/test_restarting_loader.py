"""Loader workers that are killed, stopped, or can't be started."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import draw_images
from torch.utils.data import DataLoader

from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.data import loader
from pretrain.data.images import Images
from pretrain.data.loader import EpochSampler, RestartingLoader, make_loader
from pretrain.data.sources import Source, open_data
from pretrain.infobatch.sampler import InfoBatch


def source(folder: Path, **settings) -> Source:
    return open_data(Data(source=str(folder), **settings), seed=0)


def images(folder: Path, **settings) -> Images:
    return source(folder, **settings).train


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
@pytest.mark.usefixtures("default_sigchld")
def test_a_worker_is_killed_or_stopped(number: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loader, "BATCH_TIMEOUT", 1.0 if number == signal.SIGSTOP else 60.0)
    data = images(draw_images(tmp_path, 90), workers=2)
    expected = visited(make_loader(images(tmp_path), EpochSampler(whole := InfoBatch(len(data), epochs=2)), 8), whole)
    before, messages = {*multiprocessing.active_children()}, []

    def harm() -> None:
        for worker in {*multiprocessing.active_children()} - before:
            os.kill(worker.pid or 0, number)

    infobatch = InfoBatch(len(data), epochs=2)
    batches = RestartingLoader(lambda: make_loader(data, EpochSampler(infobatch), 8), messages.append)
    assert visited(batches, infobatch, harm) == expected
    assert len(messages) == 1 and "new ones continue with the same batch" in messages[0]


class NoRoom:
    """A loader where /dev/shm is full: no space for the semaphores of its queues."""

    num_workers = 1

    def __iter__(self) -> Iterator[int]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_interrupt_while_workers_start_leaves_none() -> None:
    """Workers ignore SIGTERM, so one that is not killed would block the program's exit forever."""

    class Starting(NoRoom):
        def __iter__(self) -> Iterator[int]:
            os.kill(os.getpid(), signal.SIGINT)  # the main thread is interrupted while this one continues
            time.sleep(0.3)
            worker = multiprocessing.Process(target=time.sleep, args=(60,), daemon=True)
            worker.start()
            started.append(worker)
            return iter([1])

    started: list[multiprocessing.Process] = []
    batches = RestartingLoader(Starting, lambda sentence: None)  # type: ignore[arg-type]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt), batches:
            next(iter(batches))
    finally:
        signal.signal(signal.SIGINT, before)
    (worker,) = started
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


class Dying:
    """A data set that kills the process that reads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.slow
def test_workers_lost_twice_raise() -> None:
    messages: list[str] = []
    batches = RestartingLoader(lambda: DataLoader(Dying(), num_workers=1), messages.append)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"lost twice for one batch .*exited unexpectedly"):
        next(iter(batches))
    assert len(messages) == 1


def test_workers_that_can_not_be_started_raise() -> None:
    batches = RestartingLoader(NoRoom, lambda sentence: None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"can't be started .*No space left on device.*more space in /dev/shm"):
        next(iter(batches))


def test_an_error_of_the_data_set_is_raised() -> None:
    class Wrong(Dying):
        def __getitem__(self, index: int) -> int:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        next(iter(RestartingLoader(lambda: DataLoader(Wrong(), num_workers=0), lambda sentence: None)))  # type: ignore[arg-type]
