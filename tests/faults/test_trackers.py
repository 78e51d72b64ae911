"""A tracker that is down, fails later, or hangs: the run is unchanged, and its metrics.jsonl is complete."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from conftest import read_metrics
from programs import common, same, train

from pretrain.training import trackers


def raising(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route\nto host")


@pytest.fixture(scope="module")
def untracked(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers") / "untracked"
    train("train_diffusion.py", *common(pictures, folder))
    return folder


@pytest.fixture
def tracked(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[Path, list[str]]]:
    """A run with a tracker; returns its folder and its messages about trackers."""

    def run() -> tuple[Path, list[str]]:
        capsys.readouterr()
        train("train_diffusion.py", *common(pictures, tmp_path / "run"), "--tracker", "tensorboard")
        return tmp_path / "run", [line for line in capsys.readouterr().out.splitlines() if "--tracker" in line]

    return run


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in read_metrics(folder)]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("store_init_configuration", "log_images")]


@pytest.mark.parametrize("method", ["start", "log", "finish", *SLOW])
def test_a_failing_tracker_is_reported_once(method: str, untracked: Path, tracked, monkeypatch) -> None:
    monkeypatch.setattr(TensorBoardTracker, method, raising)
    folder, message = tracked()
    assert message == [
        "warning: --tracker tensorboard failed (ConnectionError: no route to host); it gets no more data, the training "
        "continues, metrics.jsonl has all numbers"
    ]
    assert same(untracked, folder) and timeless(untracked) == timeless(folder)
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize(("room", "why"), [(2, "is 2 calls behind"), (1000, "took more than 0 s to finish")])
def test_a_hanging_tracker_does_not_block_training(
    room: int, why: str, untracked: Path, tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = threading.Event()
    monkeypatch.setattr(TensorBoardTracker, "log", lambda *_, **__: hung.wait())
    monkeypatch.setattr(trackers, "MAX_PENDING", room)
    monkeypatch.setattr(trackers, "TIMEOUT", 0.3)
    try:
        folder, message = tracked()
        assert len(message) == 1 and why in message[0]
        assert same(untracked, folder) and timeless(untracked) == timeless(folder)
    finally:
        hung.set()
