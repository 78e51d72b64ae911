"""Checkpoints written beside the training, which waits for the copy of its state alone."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from pretrain.checkpoint import storage
from pretrain.config.schema import Checkpoint
from pretrain.core.errors import UserError


class Writer:
    """Writes a run's checkpoints in a thread of its own, one after the other. Use it as a context.

    A checkpoint that can't be written is told of, and the training goes on as long as there is an earlier one.

    Args:
        folder: of the checkpoints.
        settings: when they are written and which are kept.
        last: the one that the run goes on from, if it does.
        tell: called with a sentence about one that could not be written.
    """

    def __init__(self, folder: Path, settings: Checkpoint, last: Path | None, tell: Callable[[str], None]) -> None:
        self.folder, self.settings, self.last, self.tell = folder, settings, last, tell
        self.failure: Exception | None = None
        self._thread: Thread | None = None
        self._began = time.monotonic()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is not None and kind is not KeyboardInterrupt:  # who says that twice means at once
            self._thread.join()

    @property
    def idle(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def due(self) -> bool:
        """Whether the clock asks for one; not while one is being written."""
        minutes = self.settings.minutes
        return bool(minutes) and self.idle and time.monotonic() - self._began > 60 * minutes

    def save(self, step: int, state: storage.State, first: Callable[[], None] = lambda: None) -> None:
        """Copy a state and have it written, when the one before it is.

        Args:
            step: optimizer steps made.
            state: may change when this returns.
            first: writes what must be on disk before it.

        Raises:
            UserError: the one before could not be written, and there is no other.
        """
        self.report()
        self._began = time.monotonic()
        try:
            first()
        except OSError as error:
            self.failure = error
        else:
            self._thread = Thread(target=self._write, args=(step, state.copied()), name="checkpoint", daemon=True)
            self._thread.start()

    def _write(self, step: int, state: storage.State) -> None:
        try:
            self.last = storage.save(self.folder, step, state, self.settings.keep, self.settings.hours)
        except Exception as error:  # whatever it is, the run must hear of it
            self.failure = error

    def report(self, *, must: bool = False) -> None:
        """Wait for what is being written, and tell if it failed.

        Args:
            must: it may not have failed.

        Raises:
            UserError: it failed and had to be written, or there is no earlier checkpoint.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self.failure = self.failure, None
        if failure is None:
            return
        if self.last is None:
            raise UserError(
                f"{failure}; there is no earlier checkpoint, so the run stops; make room and start it again"
            )
        if must and not self.last.is_dir():
            raise UserError(f"{failure}; {self.last.name} and what was before it were taken away, so the run is lost")
        if must:
            raise UserError(f"{failure}; make room, then --resume goes on from {self.last.name}")
        self.tell(f"warning: {failure}; the training goes on, the last checkpoint is {self.last.name}")
