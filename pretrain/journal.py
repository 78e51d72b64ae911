"""What a run leaves in its folder while it runs: a line of JSON per status."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of JSON lines that can be taken back to where a checkpoint was written.

    Args:
        path: the file; it is created by the first line.
        position: its length in bytes at the checkpoint that the run goes on from; what follows is dropped,
            because it will be written again.
        writes: whether this process is the one that writes; the others say nothing.
    """

    def __init__(self, path: Path, position: int = 0, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        if writes and path.exists():
            os.truncate(path, min(position, path.stat().st_size))

    @property
    def position(self) -> int:
        """Length in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def write(self, kind: str, **values: Any) -> None:
        """Append one status; on disk when this returns."""
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self, kind: str) -> list[dict[str, Any]]:
        """The statuses of one kind, oldest first."""
        if not self.path.exists():
            return []
        records = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [record for record in records if record["kind"] == kind]
