"""Console output of rank 0: a progress bar in a terminal, plain lines in a pipe or a file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pretrain.core.text import printable

LINE_INTERVAL = 30.0  # seconds between progress lines within an epoch, where there is no progress bar


def duration(seconds: float) -> str:
    """A duration as text: 75.2 gives "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Console(Console):
    """A console that ignores write errors: a full disk or a closed pipe must not end a run."""

    def print(self, *objects: Any, **options: Any) -> None:
        with suppress(OSError):
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):  # rich silences the console, then exits
            super().on_broken_pipe()


class Display:
    """Messages and progress of a program. As a context manager it shows a progress bar if the output is a terminal.

    Args:
        enabled: whether this process prints; False on all ranks but 0.
    """

    def __init__(self, enabled: bool) -> None:
        self.console = _Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            # Where FORCE_COLOR is set, as in notebooks, rich takes a pipe for a terminal.
            disable=not (enabled and self.console.is_terminal and self.console.file.isatty()),
        )
        self.task = self.bar.add_task("", total=1.0, status="")
        self.start_time = self.last_printed = time.monotonic()
        self.start_progress: float | None = None

    def __enter__(self) -> "Display":
        if not self.bar.disable:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.bar.disable:
            self.bar.stop()

    def print(self, text: str) -> None:
        """Print lines; a progress bar stays below them. Characters that can't be printed are escaped."""
        self.console.print("\n".join(map(printable, text.split("\n"))), markup=False)
        self.last_printed = time.monotonic()

    @contextmanager
    def warn_on_error(self, action: str, errors: type[Exception] = OSError) -> Iterator[None]:
        """Print errors in the `with` block as a warning instead of raising them, where training can do without.

        Args:
            action: what the block does, for the warning: "writing metrics.jsonl".
            errors: the type that is caught.
        """
        try:
            yield
        except errors as error:
            self.print(f"warning: {action} failed: {' '.join(str(error).split())}; the training continues")

    def show_progress(
        self, epoch: int, epochs: int, progress: float, speed: float, loss: float, skipped: float
    ) -> None:
        """Update the progress bar, or print a line every `LINE_INTERVAL` seconds.

        Args:
            epoch: the current one, from 1.
            epochs: of the whole run.
            progress: share of the training that is done, in [0, 1].
            speed: images per second.
            loss: mean loss.
            skipped: share of the samples that this epoch skips.
        """
        now = time.monotonic()
        if self.start_progress is None:
            self.start_time, self.start_progress = now, progress
        done = progress - self.start_progress
        left = duration((now - self.start_time) * (1 - progress) / done) if done > 0 else "--"
        status = f"loss {loss:.4f}  {speed:,.0f} images/s  {skipped:.0%} skipped  {left} left"
        title = f"epoch {epoch}/{epochs}"
        if not self.bar.disable:
            self.bar.update(self.task, description=title, completed=progress, status=status)
        elif now - self.last_printed > LINE_INTERVAL:
            self.print(f"{title}  {progress:.0%}  {status}")

    def print_summary(self, rows: list[tuple[str, str]]) -> None:
        """Print names and values in two columns."""
        self.console.print()
        for name, value in rows:
            self.console.print(f"{name:<12} {printable(value)}", markup=False)
