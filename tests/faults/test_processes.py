"""Processes that get signals, are killed or stopped: all processes of a launch exit, and none waits forever."""

import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import PRUNED, ROOT, read_metrics, tiny
from programs import common, wait_for

from pretrain.checkpoint import storage
from pretrain.distributed.launch import StopSignal
from tests.faults.trainers import HANGS, Trainers, impatient, keeping_nothing

LONG = 3000  # epochs


def settings(pictures: Path, folder: Path, epochs: int = LONG) -> list[object]:
    return [*common(pictures, folder, epochs), *PRUNED, "--evaluate.every", LONG]


def steps(folder: Path) -> int:
    """Steps of the newest checkpoint."""
    newest = storage.newest(folder / "checkpoints")
    return int(newest.name.removeprefix(storage.PREFIX)) if newest else -1


def under_way(folder: Path):
    return lambda: steps(folder) >= 4


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_of_two_processes_stops_both(number: int, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Trainers("train_diffusion.py", settings(pictures, folder), tmp_path / "out.txt", processes=2) as trainers:
        trainers.until(under_way(folder))
        trainers.send(number, 1)
        assert trainers.wait() == [75, 75]
    message = (tmp_path / "out.txt").read_text()
    stop = re.search(rf"stopped by {signal.Signals(number).name} in epoch (\d+) after step (\d+)", message)
    assert stop and int(stop[2]) == steps(folder) and message.count("stopped by") == 1
    assert storage.newest_whole(folder / "checkpoints").skipped == {}  # type: ignore[union-attr]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_exits_at_once_and_the_last_checkpoint_is_complete(
    number: int, status: int, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with Trainers("train_diffusion.py", settings(pictures, folder), tmp_path / "out.txt", first=slow_saves) as trainers:
        trainers.until(under_way(folder))
        reached = steps(folder)
        trainers.send(number, 0)
        trainers.until(lambda: (tmp_path / "saving").exists())
        trainers.send(number, 0)  # the terminal's beside the launcher's
        time.sleep(StopSignal.REPEAT_WINDOW)
        assert not trainers.over
        trainers.send(number, 0)
        assert trainers.wait() == [status]
    found = storage.newest_whole(folder / "checkpoints")
    assert found is not None and steps(folder) >= reached
    assert all(path.suffix == storage.PART for path in found.skipped)


def slow_saves() -> None:
    """After a signal, a save takes ten minutes."""
    from pretrain.distributed import launch

    save, handle, signals = storage.write_manifest, launch.StopSignal._handle, []

    def noted(self, number, frame) -> None:
        signals.append(number)
        handle(self, number, frame)

    def slowly(folder: Path, *more, **about) -> None:
        if signals:
            (folder.parents[2] / "saving").touch()
            time.sleep(600)
        save(folder, *more, **about)

    storage.write_manifest, launch.StopSignal._handle = slowly, noted


def test_a_program_that_fails_does_not_wait_for_its_workers(pictures: Path, tmp_path: Path) -> None:
    words = [*settings(pictures, tmp_path / "run"), "--data.workers", 2]
    with Trainers("train_diffusion.py", words, tmp_path / "out.txt", first=failing) as trainers:
        assert trainers.wait() == [1]
    assert "KeyError: 'mine'" in (tmp_path / "out.txt").read_text()


def failing() -> None:
    from pretrain.adapters.ddpm import DDPM

    keeping_nothing()
    call = DDPM.__call__

    def fails(self, model, batch, draws):
        if len(batch.image) > 4:  # in training
            raise KeyError("mine" if multiprocessing.active_children() else "no worker")
        return call(self, model, batch, draws)

    DDPM.__call__ = fails


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)])
def test_a_killed_or_stopped_process_is_named_and_the_others_exit(
    number: int, rank: int, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = settings(pictures, folder)
    with Trainers("train_diffusion.py", words, tmp_path / "out.txt", processes=2, first=impatient) as trainers:
        trainers.until(under_way(folder))
        trainers.send(number, rank)
        gone, left = trainers.processes[rank], trainers.processes[1 - rank]
        trainers.until(lambda: not left.is_alive())
    message = (tmp_path / "out.txt").read_text()
    assert left.exitcode == 76, message
    line = re.search(
        rf"error: \[rank {1 - rank}\] rank {rank} \(process {gone.pid} on .*\) (.*), epoch \d+, step \d+", message
    )
    assert line and ("sent no heartbeat" in line[1] or "is gone" in line[1]), message
    assert "Traceback" not in message and storage.newest_whole(folder / "checkpoints") is not None


@pytest.mark.slow
def test_no_process_is_left_if_the_launcher_is_killed(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = tiny("train_diffusion.py", *settings(pictures, folder), "--data.workers", 1)
    words += ["--data.size", "12", "--data.crop", "0.5"]  # which workers crop
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with (tmp_path / "out.txt").open("w") as out:
        launcher = subprocess.Popen([*launch, ROOT / "train_diffusion.py", *words], stdout=out, stderr=out)
    wait_for(under_way(folder), launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) >= 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(family, timeout=HANGS)
    for process in alive:
        process.kill()
    assert not alive
    assert "stopped by SIGTERM" in (tmp_path / "out.txt").read_text()
    assert storage.newest_whole(folder / "checkpoints") is not None


def test_resumed_metrics_have_every_epoch_once(pictures: Path, tmp_path: Path) -> None:
    """Killed and resumed by two processes: every epoch once."""
    folder = tmp_path / "run"
    with Trainers("train_diffusion.py", settings(pictures, folder, 6), tmp_path / "out.txt", processes=2) as trainers:
        trainers.until(under_way(folder))
        for rank in range(2):
            trainers.send(signal.SIGKILL, rank)
    with Trainers("train_diffusion.py", ["--resume", "--output-dir", folder], tmp_path / "out.txt", processes=2) as two:
        assert two.wait() == [0, 0]
    assert [record["epoch"] for record in read_metrics(folder) if record["kind"] == "epoch"] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "summary.json").read_text())["steps"] == steps(folder)
