"""metrics.jsonl on a disk that is full."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import read_metrics

from pretrain.training.metrics_log import MetricsLog


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes (EFBIG): a full disk, for one process and without a mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_metrics_log_loses_no_line_to_a_full_disk(tmp_path: Path) -> None:
    messages: list[str] = []
    lines = MetricsLog(tmp_path / "metrics.jsonl", log=messages.append)
    lines.write("epoch", number=0)
    with full_disk(40):
        for number in range(1, 4):
            lines.write("epoch", number=number)
        with pytest.raises(OSError):
            lines.flush()
    assert [record["number"] for record in lines.read("epoch")] == [0, 1, 2, 3] and len(messages) == 3
    lines.write("epoch", number=4)
    assert [record["number"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert lines.position == lines.path.stat().st_size
