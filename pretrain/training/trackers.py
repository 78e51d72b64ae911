"""Logging to experiment trackers in the background: training never waits for one."""

from collections.abc import Callable
from queue import Full, Queue
from threading import Thread
from typing import Any

import numpy as np

MAX_PENDING = 1000  # calls that wait for a slow tracker; one that is further behind is disabled
TIMEOUT = 60.0  # seconds that the end of a run waits for the remaining calls


class Trackers:
    """Calls a run's trackers in a thread. A tracker that fails or is too slow is disabled, with a warning.

    No result is lost by that: metrics.jsonl has all numbers, the run's folder all pictures.

    Args:
        accelerator: accelerate's `Accelerator`, with the run's trackers.
        settings: of the run, by name; logged as its configuration.
        main: whether this process logs (rank 0).
        log: called with the warning.
    """

    def __init__(self, accelerator: Any, settings: dict[str, Any], main: bool, log: Callable[[str], None]) -> None:
        self.accelerator, self.warn = accelerator, log
        self.disabled = not (main and accelerator.log_with)
        self._queue: Queue[Callable[[], object] | None] = Queue(MAX_PENDING)
        self._thread = Thread(target=self._work, daemon=True, name="trackers")
        if not self.disabled:
            self._thread.start()
            self._put(lambda: accelerator.init_trackers("run", {name: str(value) for name, value in settings.items()}))

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log numbers by name, after this many optimizer steps."""
        self._put(lambda: self.accelerator.log(values, step=step))

    def log_image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Log a picture, uint8 [H, W, C], to the trackers that accept images."""

        def log() -> None:
            for tracker in self.accelerator.trackers:
                log_images: Any = getattr(tracker, "log_images", None)
                if log_images is not None:
                    images = picture if tracker.name == "aim" else picture[None]  # the others take a batch
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    log_images({name: images}, step=step, **layout)

        self._put(log)

    def finish(self) -> None:
        """Finish the trackers; waits up to `TIMEOUT` for the remaining calls."""
        self._put(lambda: [tracker.finish() for tracker in self.accelerator.trackers])
        if not self.disabled:
            self._put(None)
            self._thread.join(TIMEOUT)
            if self._thread.is_alive():
                self._disable(f"took more than {TIMEOUT:.0f} s to finish")

    def _put(self, call: Callable[[], object] | None) -> None:
        if not self.disabled:
            try:
                self._queue.put_nowait(call)
            except Full:
                self._disable(f"is {MAX_PENDING} calls behind")

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            if not self.disabled:
                try:
                    call()
                except Exception as error:  # of the network, a token, a quota, or the library itself
                    reason = " ".join(str(error).split()) or "no reason given"
                    self._disable(f"failed ({type(error).__name__}: {reason})")

    def _disable(self, why: str) -> None:
        if self.disabled:  # the warning was logged
            return
        self.disabled = True
        name = ", ".join(str(getattr(each, "value", each)) for each in self.accelerator.log_with)
        self.warn(
            f"warning: --tracker {name} {why}; it gets no more data, the training continues, metrics.jsonl has all "
            "numbers"
        )
