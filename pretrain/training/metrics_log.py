"""metrics.jsonl: one line of JSON per epoch and per evaluation."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.core.files import flush, open_own


class MetricsLog:
    """An append-only file of JSON lines that is truncated to its length at a checkpoint when a run is resumed.

    If the disk is full, lines are kept in memory until it has space; no checkpoint is written before that.

    Args:
        path: the file; created with the first line.
        length: of the file in bytes at the checkpoint that the run continues from; what follows is removed, because the
            run will write it again.
        writes: whether this process writes (rank 0).
        log: called with a warning if a line can't be written or read.
    """

    def __init__(
        self, path: Path, length: int = 0, writes: bool = True, log: Callable[[str], None] = lambda message: None
    ) -> None:
        self.path, self.writes, self.log = path, writes, log
        self._pending: list[dict[str, Any]] = []  # records that are not on disk yet
        self._length = self._truncate(length) if writes else 0  # in bytes, of those that are

    def _truncate(self, length: int) -> int:
        """Remove what follows `length` bytes, and lines before it that are damaged, with a warning; the new length."""
        if not self.path.exists():
            if length:
                self.log(f"warning: {self.path} is gone; it begins anew")
            return 0
        with os.fdopen(open_own(self.path, os.O_RDWR), "r+b") as file:
            text = file.read(min(length, os.fstat(file.fileno()).st_size))  # of a damaged state it may be any number
            lines = text.splitlines(keepends=True)
            bad = next((n for n, line in enumerate(lines, 1) if _record(line) is None), 0)
            whole = b"".join(line for line in lines if _record(line) is not None)
            if len(whole) < length:
                what = f"line {bad} can't be read" if bad else f"it has {len(text):,} of its {length:,} bytes"
                self.log(f"warning: {self.path} has changed since the checkpoint: {what}; the rest is kept")
                file.seek(0)
                file.write(whole)
            file.truncate(len(whole))
        return len(whole)

    @property
    def position(self) -> int:
        """Length of the file in bytes, once all records are on disk."""
        return self._length + len(self._text())

    def _text(self) -> bytes:
        return "".join(json.dumps(record) + "\n" for record in self._pending).encode()

    def write(self, kind: str, **values: Any) -> None:
        """Append a record; it is on disk when this returns, unless the disk is full.

        Args:
            kind: "epoch" or "evaluation".
            values: plain JSON.
        """
        if not self.writes:
            return
        self._pending.append({"kind": kind, **values})
        try:
            self.flush()
        except OSError as error:
            self.log(
                f"warning: {self.path} can't be written: {error.strerror}; its lines are kept in memory until it can"
            )

    def flush(self) -> None:
        """Write the records that could not be written before.

        Raises:
            OSError: they still can't be, or lines of the file were removed meanwhile.
        """
        if not self._pending:
            return
        text = self._text()
        flags = os.O_RDWR if self._length else os.O_RDWR | os.O_CREAT
        try:
            with os.fdopen(open_own(self.path, flags), "r+b") as file:
                if file.seek(0, os.SEEK_END) < self._length:
                    raise OSError(errno.ENODATA, "lines that were written to it are gone")
                file.truncate(self._length)  # an incomplete line of a full disk
                file.seek(self._length)
                file.write(text)
                file.flush()
                flush(file.fileno())
        except OSError as error:  # of a descriptor: without the name
            raise OSError(error.errno, error.strerror or str(error), str(self.path)) from None
        self._length += len(text)
        self._pending.clear()

    def read(self, kind: str) -> list[dict[str, Any]]:
        """The records of a kind, oldest first; a line that can't be read is left out, with a warning.

        Raises:
            OSError: the file can't be read.
        """
        text = self.path.read_bytes() if self.path.is_file() else b""
        # The last line of a run that was killed may be incomplete.
        complete = self._length if self.writes else text.rfind(b"\n") + 1
        records = [_record(line + b"\n") for line in text[:complete].splitlines()]
        if not self.writes and None in records:  # a run has reported it when it began
            self.log(f"warning: {self.path}: line {records.index(None) + 1} can't be read and is left out")
        return [record for record in (*records, *self._pending) if record and record["kind"] == kind]


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if the line is incomplete or not a record."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "kind" in found else None
