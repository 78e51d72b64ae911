"""What a person sees: a live line in a terminal, plain lines in a pipe or a file; from rank 0 alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

QUIET = 30.0  # seconds between the plain lines inside an epoch


def duration(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Console(Console):
    """A full disk under its file, or nobody at the end of its pipe, is no reason to end a run."""

    def print(self, *what: Any, **how: Any) -> None:
        with suppress(OSError):
            super().print(*what, **how)

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):  # what it leaves is silence
            super().on_broken_pipe()


class Display:
    """The running commentary. Use it as a context.

    Args:
        speaks: whether this process is the one that prints.
    """

    def __init__(self, speaks: bool) -> None:
        self.console = _Console(quiet=not speaks, highlight=False, soft_wrap=True)
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            disable=not (speaks and self.console.is_terminal),
        )
        self.task = self.live.add_task("", total=1.0, status="")
        self.started = self.spoke = time.monotonic()
        self.at_start: float | None = None

    def __enter__(self) -> "Display":
        if not self.live.disable:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.live.disable:
            self.live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)
        self.spoke = time.monotonic()

    @contextmanager
    def trying(self, what: str, errors: type[Exception] = OSError) -> Iterator[None]:
        """For what the training can do without: an error becomes a line."""
        try:
            yield
        except errors as error:
            self.say(f"warning: {what} failed: {' '.join(str(error).split())}; the training goes on")

    def step(self, epoch: int, epochs: int, progress: float, speed: float, loss: float, skipped: float) -> None:
        """Where the run is; `speed` in images per second, `skipped` the share of this epoch."""
        now = time.monotonic()
        if self.at_start is None:
            self.started, self.at_start = now, progress
        done = progress - self.at_start
        left = duration((now - self.started) * (1 - progress) / done) if done > 0 else "--"
        status = f"loss {loss:.4f}  {speed:,.0f} images/s  {skipped:.0%} skipped  {left} left"
        title = f"epoch {epoch}/{epochs}"
        if not self.live.disable:
            self.live.update(self.task, description=title, completed=progress, status=status)
        elif now - self.spoke > QUIET:
            self.say(f"{title}  {progress:.0%}  {status}")

    def summary(self, rows: list[tuple[str, str]]) -> None:
        """The last word."""
        self.console.print()
        for name, value in rows:
            self.console.print(f"{name:<12} {value}", markup=False)
