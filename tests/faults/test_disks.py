"""Disks that fill up, become read-only or vanish during a run: real ones, mounted for the test."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import PRUNED, read_metrics
from programs import common, refused, same, train


def mount(*words: object) -> bool:
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory with space for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=12m", "tmpfs", folder):
        pytest.skip("mounting takes rights that are not there")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def at_steps(monkeypatch: pytest.MonkeyPatch, **harm: Callable[[], object]) -> None:
    """Call something before an optimizer step: `at_3=...`."""
    step, calls = torch.optim.AdamW.step, [0]

    def stepped(self, *arguments, **more):
        calls[0] += 1
        harm.get(f"at_{calls[0]}", lambda: None)()
        return step(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)


def settings(pictures: Path, folder: Path) -> list[object]:
    return [*common(pictures, folder), *PRUNED, "--micro-batch", 6, "--checkpoint.every", 1]


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_full_disk_costs_only_what_could_not_be_written(
    pictures: Path, finished: Path, disk: Path, monkeypatch, capsys
) -> None:
    at_steps(monkeypatch, at_3=lambda: fill(disk), at_9=lambda: (disk / "ballast").unlink())
    train("train_diffusion.py", *settings(pictures, disk / "run"))
    assert "the training continues, the last checkpoint is step-0000000" in capsys.readouterr().out
    assert same(finished, disk / "run") and read_metrics(finished) == read_metrics(disk / "run")


def test_a_disk_that_stays_full_stops_the_run_which_can_be_resumed(
    pictures: Path, finished: Path, disk: Path, monkeypatch
) -> None:
    at_steps(monkeypatch, at_5=lambda: fill(disk))
    message = refused("train_diffusion.py", *settings(pictures, disk / "run"))
    assert "free space, then --resume continues from step-0000000" in message
    (disk / "ballast").unlink()
    train("train_diffusion.py", "--resume", "--output-dir", disk / "run")
    assert same(finished, disk / "run") and read_metrics(finished) == read_metrics(disk / "run")


def test_a_disk_that_is_read_only(pictures: Path, disk: Path) -> None:
    """It raises before anything else, and existing files stay as they are."""
    train("train_diffusion.py", *settings(pictures, disk / "run"), "--epochs", 1)
    files = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    assert mount("-o", "remount,ro", disk)
    assert "can't be written to" in refused("train_diffusion.py", "--resume", "--output-dir", disk / "run")
    assert "can't be written to" in refused("train_diffusion.py", *settings(pictures, disk / "other"))
    assert files == {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}


def test_a_run_folder_that_is_renamed_for_a_while_changes_nothing(
    pictures: Path, finished: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    here, there = tmp_path / "run", tmp_path / "elsewhere"
    at_steps(monkeypatch, at_3=lambda: here.rename(there), at_9=lambda: there.rename(here))
    train("train_diffusion.py", *settings(pictures, here))
    assert "No such file or directory; the training continues" in capsys.readouterr().out
    assert same(finished, here) and read_metrics(finished) == read_metrics(here)


def test_a_run_folder_that_is_removed_stops_the_run(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    at_steps(monkeypatch, at_5=lambda: (tmp_path / "run").rename(tmp_path / "bin"))
    message = refused("train_diffusion.py", *settings(pictures, tmp_path / "run"))
    assert "were removed: the run is lost" in message and not (tmp_path / "run").exists()


def test_a_truncated_metrics_log_stops_the_run(pictures: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    at_steps(monkeypatch, at_5=lambda: (tmp_path / "run" / "metrics.jsonl").write_text(""))
    assert "lines that were written to it are gone" in refused(
        "train_diffusion.py", *settings(pictures, tmp_path / "run")
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
