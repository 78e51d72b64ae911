"""A DataLoader that survives the loss of a worker, and a sampler of (epoch, index)."""

import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from pretrain.core.errors import UserError
from pretrain.data.images import Images
from pretrain.distributed.launch import StopSignal

START_TIMEOUT = 3.0  # seconds for workers that are just starting when they are to end
BATCH_TIMEOUT = 300.0  # seconds for a batch; after that the workers count as hung


class RestartingLoader:
    """Yields the batches of a DataLoader; if a worker is lost, makes a new one that continues with the same batch.

    Use it as a context manager: leaving it ends the workers, which ignore SIGTERM (the trainer handles it), so that a
    program that fails would otherwise wait for them forever.

    Args:
        make: makes the DataLoader; its sampler must start behind the last batch that was used, as InfoBatch does.
        log: called with a message if a worker was lost.
    """

    def __init__(self, make: Callable[[], DataLoader[Any]], log: Callable[[str], None]) -> None:
        self.make, self.log = make, log
        self.loader = make()
        self._fetching = threading.Thread()  # none yet
        self._other_children = {*multiprocessing.active_children()}

    def __enter__(self) -> "RestartingLoader":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            del self.loader  # which ends its workers
        self._kill()

    def _kill(self) -> None:
        """Kill all workers, including those that are just starting."""
        if self._fetching.is_alive():
            self._fetching.join(START_TIMEOUT)
        for worker in {*multiprocessing.active_children()} - self._other_children:
            worker.kill()

    def __iter__(self) -> Iterator[Any]:
        """The batches of one epoch, or of the rest of it.

        Raises:
            UserError: workers can't be started, or were lost twice for the same batch.
        """
        lost = 0
        while True:
            try:
                batches = self._start()
                while (batch := self._fetch(lambda batches=batches: next(batches, None))) is not None:
                    lost = 0
                    yield batch
                return
            except _WorkerLost as error:
                lost += 1
                self._kill()  # a worker that was stopped by SIGSTOP would never end
                self.loader = self.make()
                if lost > 1:
                    raise UserError(
                        f"loader workers were lost twice for one batch ({error}); give fewer --data.workers, or more "
                        "memory and space in /dev/shm",
                        local=True,
                    ) from None
                self.log(f"warning: a loader worker was lost ({error}); new ones continue with the same batch")

    def _start(self) -> Iterator[Any]:
        try:
            return self._fetch(lambda: iter(self.loader))
        except OSError as error:  # no space for shared memory, or no more processes
            raise UserError(
                f"loader workers can't be started ({error}); give fewer --data.workers, or more space in /dev/shm or "
                "more open files (ulimit -n)",
                local=True,
            ) from None

    def _fetch(self, function: Callable[[], Any]) -> Any:
        """What a function that uses the DataLoader returns.

        With workers it runs in a thread. A worker that stops while it sends a tensor is waited for without end,
        whatever the DataLoader's timeout. And outside of the main thread torch installs no handler of SIGCHLD, which
        would raise wherever the training is, not where a batch is waited for.
        """
        if not self.loader.num_workers:
            return function()
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def fetch() -> None:
            try:
                results.put(function())
            except BaseException as error:
                results.put(error)

        self._fetching = threading.Thread(target=fetch, name="batch", daemon=True)
        self._fetching.start()
        try:
            result = results.get(timeout=BATCH_TIMEOUT)
        except queue.Empty:
            raise _WorkerLost(f"no batch in {BATCH_TIMEOUT:.0f} s") from None
        if isinstance(result, (ConnectionError, EOFError)):
            raise _WorkerLost(type(result).__name__)
        if isinstance(result, RuntimeError) and str(result).startswith("DataLoader worker"):
            raise _WorkerLost(str(result).split("\n")[0].rstrip("."))
        if isinstance(result, BaseException):
            raise result
        return result


class _WorkerLost(Exception):
    """A worker has ended or hangs."""


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) for each index of an InfoBatch; persistent workers can't know the epoch otherwise."""

    def __init__(self, infobatch: Any) -> None:
        self.infobatch = infobatch

    def __len__(self) -> int:
        return len(self.infobatch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.infobatch.epoch
        return ((epoch, index) for index in self.infobatch)


def make_loader(images: Images, sampler: Iterable[Any], batch_size: int) -> DataLoader[Any]:
    """A DataLoader of what `Images.__getitems__` returns; it uses no global random generator."""
    cache = images.cache
    workers = 0 if cache and cache.complete else images.data.workers
    return DataLoader(
        images,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_identity,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() and not (cache and cache.image.is_cuda),
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),
    )


def _identity(batch: Any) -> Any:
    """`Images.__getitems__` returns a batch already."""
    return batch


def _ignore_signals(worker: int) -> None:
    """A signal to the process group must not end the workers before the trainer has written a checkpoint."""
    for number in StopSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
