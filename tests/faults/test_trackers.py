"""A tracker that is down, fails later, or hangs: the run is the same without it, and its journal is whole."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker
from conftest import journal
from programs import common, same, train

from pretrain.training import trackers


def raising(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route\nto host")


@pytest.fixture(scope="module")
def untold(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trackers") / "untold"
    train("train_diffusion.py", *common(pictures, folder))
    return folder


@pytest.fixture
def told(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[Path, list[str]]]:
    """A run with a tracker; its folder, and what it said of trackers."""

    def run() -> tuple[Path, list[str]]:
        capsys.readouterr()
        train("train_diffusion.py", *common(pictures, tmp_path / "run"), "--tracker", "tensorboard")
        return tmp_path / "run", [line for line in capsys.readouterr().out.splitlines() if "--tracker" in line]

    return run


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in journal(folder)]


@pytest.mark.parametrize("method", ["start", "store_init_configuration", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_told_of_once(method: str, untold: Path, told, monkeypatch) -> None:
    monkeypatch.setattr(TensorBoardTracker, method, raising)
    folder, said = told()
    assert said == [
        "warning: --tracker tensorboard failed (ConnectionError: no route to host); it gets no more data, the training "
        "continues, metrics.jsonl has all numbers"
    ]
    assert same(untold, folder) and timeless(untold) == timeless(folder)
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize(("room", "why"), [(2, "is 2 calls behind"), (1000, "took more than 0 s to finish")])
def test_nobody_waits_for_a_tracker_that_hangs(
    room: int, why: str, untold: Path, told, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = threading.Event()
    monkeypatch.setattr(TensorBoardTracker, "log", lambda *_, **__: hung.wait())
    monkeypatch.setattr(trackers, "MAX_PENDING", room)
    monkeypatch.setattr(trackers, "TIMEOUT", 0.3)
    try:
        folder, said = told()
        assert len(said) == 1 and why in said[0]
        assert same(untold, folder) and timeless(untold) == timeless(folder)
    finally:
        hung.set()
