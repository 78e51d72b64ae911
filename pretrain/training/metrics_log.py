"""What a run leaves in its folder while it runs: a line of JSON per status."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.core.files import open_own


class MetricsLog:
    """An append-only file of JSON lines that can be taken back to where a checkpoint was written.

    Where the disk has no room, lines are kept until it has; a checkpoint is not written without them.

    Args:
        path: the file; it is created by the first line.
        position: its length in bytes at the checkpoint that the run goes on from; what follows is dropped,
            because it will be written again.
        writes: whether this process is the one that writes; the others say nothing.
        tell: called with a sentence when a line can't be written.
    """

    def __init__(
        self, path: Path, position: int = 0, writes: bool = True, tell: Callable[[str], None] = lambda sentence: None
    ) -> None:
        self.path, self.writes, self.tell = path, writes, tell
        self._records: list[dict[str, Any]] = []  # those that are not on disk yet
        self._length = self._whole(position)  # in bytes, of what is
        if writes and path.exists():
            with os.fdopen(open_own(path, os.O_RDWR), "r+b") as file:
                file.truncate(self._length)

    def _whole(self, position: int) -> int:
        """Length of the lines up to a position; they may have been cut by what else writes to the folder."""
        text = self.path.read_bytes()[:position] if self.path.is_file() else b""
        whole = text.rfind(b"\n") + 1
        bad = next((n for n, line in enumerate(text[:whole].splitlines(), 1) if _record(line) is None), 0)
        if self.writes and (whole < position or bad):
            what = f"line {bad} can't be read" if bad else f"it has {whole:,} of its {position:,} bytes"
            self.tell(f"warning: {self.path} is not as the checkpoint left it ({what}); the run goes on with the rest")
        return whole

    @property
    def position(self) -> int:
        """Length in bytes, when all is on disk."""
        return self._length + len(self._text())

    def _text(self) -> bytes:
        return "".join(json.dumps(record) + "\n" for record in self._records).encode()

    def write(self, kind: str, **values: Any) -> None:
        """Append one status; on disk when this returns, if there is room."""
        if not self.writes:
            return
        self._records.append({"kind": kind, **values})
        try:
            self.flush()
        except OSError as error:
            self.tell(f"warning: {self.path} can't be written: {error.strerror}; its lines are kept until it can")

    def flush(self) -> None:
        """Write what could not be written before.

        Raises:
            OSError: it still can't.
        """
        if not self._records:
            return
        text = self._text()
        flags = os.O_RDWR if self._length else os.O_RDWR | os.O_CREAT
        with os.fdopen(open_own(self.path, flags), "r+b") as file:
            if file.seek(0, os.SEEK_END) < self._length:
                raise OSError(errno.ENODATA, "lines that it had are gone")
            file.truncate(self._length)  # half a line, where the disk was full
            file.seek(self._length)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(text)
        self._records.clear()

    def read(self, kind: str) -> list[dict[str, Any]]:
        """The statuses of one kind, oldest first."""
        text = self.path.read_bytes() if self.path.is_file() else b""
        whole = (
            self._length if self.writes else text.rfind(b"\n") + 1
        )  # of a run that was killed, the last one may not be
        lines = text[:whole].splitlines()
        records = [*map(_record, lines), *self._records]
        return [record for record in records if record is not None and record["kind"] == kind]


def _record(line: bytes) -> dict[str, Any] | None:
    """The status in a line; None if it has none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "kind" in found else None
