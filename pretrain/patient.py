"""A loader whose workers may die or hang once."""

import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from pretrain.errors import Refused

PATIENCE = 300.0  # seconds for a batch; then the workers are taken to hang


class Patient:
    """Hands out what a loader does. Where a worker is lost, the loader is made anew and goes on with the same batch.

    Its sampler must begin where the losses end that came back, as InfoBatch does; nothing is then lost or seen twice.

    Args:
        make: the loader.
        tell: called with a sentence when one was lost.
    """

    def __init__(self, make: Callable[[], DataLoader[Any]], tell: Callable[[str], None]) -> None:
        self.make, self.tell = make, tell
        self.loader = make()

    def __iter__(self) -> Iterator[Any]:
        """One epoch, or what is left of it.

        Raises:
            Refused: workers are lost twice for one batch.
        """
        lost = 0
        while True:
            others = {*multiprocessing.active_children()}
            batches = iter(self.loader)
            if self.loader.num_workers and threading.current_thread() is threading.main_thread():
                # Torch would raise from its handler wherever the training is, not where a batch is waited for.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                while True:
                    batch = self._next(batches)
                    if batch is None:
                        return
                    lost = 0
                    yield batch
            except _Lost as error:
                lost += 1
                for worker in {*multiprocessing.active_children()} - others:
                    worker.kill()  # one that was stopped would never end
                del batches
                self.loader = self.make()
                if lost > 1:
                    raise Refused(
                        f"loader workers were lost twice for one batch ({error}); give fewer --data.workers, or more "
                        "memory and room in /dev/shm",
                        local=True,
                    ) from None
                self.tell(f"warning: a loader worker was lost ({error}); new ones go on with the same batch")

    def _next(self, batches: Iterator[Any]) -> Any:
        if not self.loader.num_workers:
            return next(batches, None)
        # In a thread: a worker that was stopped while it hands over a tensor is waited for without end, whatever
        # the loader's own timeout is.
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put(next(batches, None))
            except BaseException as error:
                answer.put(error)

        threading.Thread(target=ask, name="batch", daemon=True).start()
        try:
            batch = answer.get(timeout=PATIENCE)
        except queue.Empty:
            raise _Lost(f"no batch in {PATIENCE:.0f} s") from None
        if isinstance(batch, (ConnectionError, EOFError)):
            raise _Lost(type(batch).__name__)
        if isinstance(batch, RuntimeError) and str(batch).startswith("DataLoader worker"):
            raise _Lost(str(batch).split("\n")[0].rstrip("."))
        if isinstance(batch, BaseException):
            raise batch
        return batch


class _Lost(Exception):
    """A worker is no more, or does nothing."""
