"""A loader whose workers may die or hang once."""

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

STARTING = 3.0  # seconds that starting workers may take once they are to end
PATIENCE = 300.0  # seconds for a batch; then the workers are taken to hang


class RestartingLoader:
    """Hands out what a loader does. Where a worker is lost, the loader is made anew and goes on with the same batch.

    Use it as a context: its workers end with it, which otherwise only SIGKILL would end (they leave SIGTERM to the
    trainer), so that a program that fails would wait for them for ever.

    Args:
        make: the loader; its sampler must begin behind the last batch that was used, as InfoBatch does.
        tell: called with a sentence when one was lost.
    """

    def __init__(self, make: Callable[[], DataLoader[Any]], tell: Callable[[str], None]) -> None:
        self.make, self.tell = make, tell
        self.loader = make()
        self._asking = threading.Thread()  # none yet
        self._others = {*multiprocessing.active_children()}

    def __enter__(self) -> "RestartingLoader":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            del self.loader  # its workers end by themselves
        self._kill()

    def _kill(self) -> None:
        """End all workers, also those that are just being started, by an interrupt's leave."""
        if self._asking.is_alive():
            self._asking.join(STARTING)
        for worker in {*multiprocessing.active_children()} - self._others:
            worker.kill()

    def __iter__(self) -> Iterator[Any]:
        """One epoch, or what is left of it.

        Raises:
            UserError: workers can't be started, or are lost twice for one batch.
        """
        lost = 0
        while True:
            try:
                batches = self._started()
                while (batch := self._asked(lambda batches=batches: next(batches, None))) is not None:
                    lost = 0
                    yield batch
                return
            except _Lost as error:
                lost += 1
                self._kill()  # one that was stopped would never end
                self.loader = self.make()
                if lost > 1:
                    raise UserError(
                        f"loader workers were lost twice for one batch ({error}); give fewer --data.workers, or more "
                        "memory and room in /dev/shm",
                        local=True,
                    ) from None
                self.tell(f"warning: a loader worker was lost ({error}); new ones go on with the same batch")

    def _started(self) -> Iterator[Any]:
        try:
            return self._asked(lambda: iter(self.loader))
        except OSError as error:  # no room for what they need to talk, or no more processes
            raise UserError(
                f"loader workers can't be started ({error}); give fewer --data.workers, or more room in /dev/shm",
                local=True,
            ) from None

    def _asked(self, what: Callable[[], Any]) -> Any:
        """What the loader answers.

        In a thread, if it has workers: one that was stopped while it hands over a tensor is waited for without end,
        whatever the loader's own timeout is. And outside of the main thread torch leaves SIGCHLD alone, from whose
        handler it would raise wherever the training is, not where a batch is waited for.
        """
        if not self.loader.num_workers:
            return what()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(what())
            except BaseException as error:
                answers.put(error)

        self._asking = threading.Thread(target=ask, name="batch", daemon=True)
        self._asking.start()
        try:
            answer = answers.get(timeout=PATIENCE)
        except queue.Empty:
            raise _Lost(f"no batch in {PATIENCE:.0f} s") from None
        if isinstance(answer, (ConnectionError, EOFError)):
            raise _Lost(type(answer).__name__)
        if isinstance(answer, RuntimeError) and str(answer).startswith("DataLoader worker"):
            raise _Lost(str(answer).split("\n")[0].rstrip("."))
        if isinstance(answer, BaseException):
            raise answer
        return answer


class _Lost(Exception):
    """A worker is no more, or does nothing."""


class EpochSampler(Sampler[tuple[int, int]]):
    """An InfoBatch's indices together with the epoch, which persistent workers can't know otherwise."""

    def __init__(self, infobatch: Any) -> None:
        self.infobatch = infobatch

    def __len__(self) -> int:
        return len(self.infobatch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.infobatch.epoch
        return ((epoch, index) for index in self.infobatch)


def make_loader(images: Images, sampler: Iterable[Any], batch_size: int) -> DataLoader[Any]:
    """A loader of (Batch, problems); it draws nothing from the global generator."""
    there = images.kept is not None and images.kept.whole
    workers = 0 if there else images.data.workers
    return DataLoader(
        images,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() and not (images.kept and images.kept.image.is_cuda),
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    """What `Images.__getitems__` gives is a batch already."""
    return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A signal to the whole process group must not take the workers before the trainer has written its state."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
