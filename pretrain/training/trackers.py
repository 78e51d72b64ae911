"""What a run tells experiment trackers, without ever waiting for one."""

from collections.abc import Callable
from queue import Full, Queue
from threading import Thread
from typing import Any

import numpy as np

ROOM = 1000  # messages that may wait for a slow tracker
PATIENCE = 60.0  # seconds that a run which is over waits for what is not told yet


class Trackers:
    """Tells a run's trackers in a thread of its own; one that fails, or is too slow, is told no more.

    Nothing is lost by that: the journal holds every number, the folder every picture.

    Args:
        accelerator: accelerate's, with the trackers that the run was given.
        settings: of the run, by name.
        main: whether this process is the one that tells.
        tell: called with a sentence when there is no more telling.
    """

    def __init__(self, accelerator: Any, settings: dict[str, Any], main: bool, tell: Callable[[str], None]) -> None:
        self.accelerator, self.tell = accelerator, tell
        self.deaf = not (main and accelerator.log_with)
        self._queue: Queue[Callable[[], object] | None] = Queue(ROOM)
        self._thread = Thread(target=self._work, daemon=True, name="trackers")
        if not self.deaf:
            self._thread.start()
            self._put(lambda: accelerator.init_trackers("run", {name: str(value) for name, value in settings.items()}))

    def log(self, values: dict[str, Any], step: int) -> None:
        """Numbers of one optimizer step."""
        self._put(lambda: self.accelerator.log(values, step=step))

    def show(self, name: str, picture: np.ndarray, step: int) -> None:
        """A picture, uint8 [H, W, C], for those of the trackers that take any."""

        def shown() -> None:
            for tracker in self.accelerator.trackers:
                log: Any = getattr(tracker, "log_images", None)
                if log is not None:
                    several = picture if tracker.name == "aim" else picture[None]  # it alone takes one at a time
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    log({name: several}, step=step, **layout)

        self._put(shown)

    def finish(self) -> None:
        """The run is over: tell what is not told yet, as long as that takes less than a minute."""
        self._put(lambda: [tracker.finish() for tracker in self.accelerator.trackers])
        if not self.deaf:
            self._put(None)
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._give_up(f"took more than {PATIENCE:.0f} s to end")

    def _put(self, message: Callable[[], object] | None) -> None:
        if not self.deaf:
            try:
                self._queue.put_nowait(message)
            except Full:
                self._give_up(f"is {ROOM} messages behind")

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            if not self.deaf:
                try:
                    message()
                except Exception as error:  # whatever it is: network, token, quota, the library itself
                    said = " ".join(str(error).split()) or "no reason given"
                    self._give_up(f"failed ({type(error).__name__}: {said})")

    def _give_up(self, why: str) -> None:
        if self.deaf:  # that was said
            return
        self.deaf = True
        name = ", ".join(str(getattr(each, "value", each)) for each in self.accelerator.log_with)
        self.tell(f"warning: --tracker {name} {why}; it is told no more, the training goes on, metrics.jsonl has all")
