"""Writing checkpoints in a background thread; training waits only for the copy of its state."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from pretrain.checkpoint import storage
from pretrain.config.schema import Checkpoint
from pretrain.core.errors import UserError, limit_reached
from pretrain.distributed.collectives import max_over_ranks


class CheckpointWriter:
    """Writes a run's checkpoints one after the other in a background thread. Use it as a context manager.

    If a checkpoint can't be written, a warning is logged and the training continues, provided that there is an earlier
    checkpoint.

    Args:
        folder: of the checkpoints.
        settings: when checkpoints are written and which ones are kept.
        last: the checkpoint that the run continues from; None for a new run.
        log: called with a warning if a checkpoint could not be written.
    """

    def __init__(self, folder: Path, settings: Checkpoint, last: Path | None, log: Callable[[str], None]) -> None:
        self.folder, self.settings, self.last, self.log = folder, settings, last, log
        self.failure: Exception | None = None
        self._thread: Thread | None = None
        self._last_save = time.monotonic()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:  # a second Ctrl-C: exit without waiting
            self._thread.join()

    @property
    def idle(self) -> bool:
        """Whether no checkpoint is being written."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def due(self) -> bool:
        """Whether `checkpoint.minutes` have passed since the last one; False while one is being written."""
        minutes = self.settings.minutes
        return bool(minutes) and self.idle and time.monotonic() - self._last_save > 60 * minutes

    def save(self, step: int, state: storage.State, flush: Callable[[], None] = lambda: None) -> None:
        """Wait for the previous checkpoint, copy a state and start writing it.

        A state with sharded tensors is written before this returns; all ranks call it.

        Args:
            step: optimizer steps made.
            state: copied before this returns.
            flush: writes what must be on disk before the checkpoint; its OSError counts as the checkpoint's.

        Raises:
            UserError: the previous checkpoint could not be written, and there is no other.
        """
        self.wait()
        self._last_save = time.monotonic()
        try:
            flush()
        except OSError as error:
            self.failure = error
            if error.filename:
                self.failure = OSError(f"{error.filename} can't be written: {error.strerror}")
                self.failure.__cause__ = error  # for `limit_reached`
        if state.is_sharded:
            if not max_over_ranks(self.failure is not None)[0]:
                self._write(step, state)
            elif self.failure is None:  # so that all ranks stop, or none
                self.failure = OSError("another process can't write its part of the checkpoint")
        elif self.failure is None:
            self._thread = Thread(target=self._write, args=(step, state.copied()), name="checkpoint", daemon=True)
            self._thread.start()

    def _write(self, step: int, state: storage.State) -> None:
        try:
            save = storage.save_sharded if state.is_sharded else storage.save
            self.last = save(self.folder, step, state, self.settings.keep, self.settings.hours)
        except Exception as error:  # an exception of a thread would be lost; `wait` reports it
            self.failure = error

    def wait(self, *, required: bool = False) -> None:
        """Wait for the checkpoint that is being written; log a warning if it failed.

        Args:
            required: raise if it failed.

        Raises:
            UserError: it failed and was required, or there is no earlier checkpoint.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self.failure = self.failure, None
        if failure is None:
            return
        remedy = limit_reached(failure) or "free space"
        if self.last is None:
            raise UserError(f"{failure}; there is no earlier checkpoint, so the run stops; {remedy}, and start again")
        if required and not self.last.is_dir():
            raise UserError(f"{failure}; {self.last.name} and the checkpoints before it were removed: the run is lost")
        if required:
            raise UserError(f"{failure}; {remedy}, then --resume continues from {self.last.name}")
        self.log(f"warning: {failure}; the training continues, the last checkpoint is {self.last.name}")
