"""Limits of the operating system, and drawing that fails: one sentence, or training continues."""

import resource
import threading
from pathlib import Path

import pytest
from conftest import PRUNED
from programs import common, train

from pretrain.core.errors import exit_on_user_error
from pretrain.training import plots
from tests.faults.trainers import Trainers, keeping_nothing


def few_files() -> None:
    keeping_nothing()
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, highest + 4))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux alone")
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_few_open_files_are_one_sentence(workers: int, pictures: Path, tmp_path: Path) -> None:
    words = [*common(pictures, tmp_path / "run", 2), "--data.workers", workers]
    with Trainers("train_diffusion.py", words, tmp_path / "out.txt", first=few_files) as trainers:
        status = trainers.wait()
    message = (tmp_path / "out.txt").read_text()
    assert status == [2], message
    assert message.count("\nerror: ") == 1 and "Traceback" not in message and "ulimit -n" in message


def test_no_more_threads_are_one_sentence(pictures: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        train("train_diffusion.py", *common(pictures, tmp_path / "run", 1))
    message = capsys.readouterr().err
    assert (
        left.value.code == 2 and "no more threads or processes can be started" in message and message.count("\n") == 1
    )


@pytest.mark.parametrize("name", ["loss_by_level", "sample_counts", "_figure"])
def test_a_chart_that_fails_does_not_end_the_run(
    name: str, pictures: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fails(*_: object) -> None:
        raise ImportError("IPython is being imported")

    monkeypatch.setattr(plots, name, fails)
    train("train_diffusion.py", *common(pictures, tmp_path / "run", 2), *PRUNED)
    message = capsys.readouterr().out
    assert "training continues" in message and "IPython is being imported" in message
    assert (tmp_path / "run" / "summary.json").is_file()
