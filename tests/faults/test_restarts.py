"""Runs that are restarted: by a launcher, after any signal, also in an evaluation, and with damaged files."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import PRUNED, ROOT, read_metrics, tiny
from programs import common, refused, same, train, wait_for

from pretrain.checkpoint import storage
from pretrain.distributed import heartbeat
from pretrain.distributed.launch import StopRequested, StopSignal
from pretrain.training.metrics_log import MetricsLog
from tests.faults.trainers import Trainers, impatient, keeping_nothing

SLOW_EVALUATION = 3600.0  # seconds


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory) -> Path:
    """A finished run of three epochs, evaluated after each."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train("train_diffusion.py", *common(pictures, run, 3), *PRUNED, "--evaluate.every", 1)
    return run


def _steps(folder: Path) -> int:
    newest = storage.newest(folder / "checkpoints")
    return int(newest.name.removeprefix(storage.PREFIX)) if newest else -1


# -- starting the same command again ----------------------------------------------------------------------


def test_resume_auto_starts_continues_and_ends(pictures: Path, trained: Path, tmp_path: Path) -> None:
    """Whatever is left of a run, the same command leads to the same end."""
    words = [*common(pictures, tmp_path / "run", 3), *PRUNED, "--evaluate.every", 1, "--resume", "auto"]
    words += ["--adapter", "ddpm"]
    run = tmp_path / "run"
    for left in ("nothing", "settings alone", "a checkpoint", "all"):
        if left == "settings alone":
            shutil.rmtree(run / "checkpoints")
            (run / "summary.json").unlink()
        elif left == "a checkpoint":
            for path in sorted((run / "checkpoints").iterdir())[1:]:
                shutil.rmtree(path)
        train("train_diffusion.py", *words)
        assert same(run, trained), left
    shutil.rmtree(run / "checkpoints")
    assert "the folder has a run" in refused("train_diffusion.py", *words)  # a finished run is not replaced
    (run / "mine.txt").touch()
    assert "'mine.txt'" in refused("train_diffusion.py", *words)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run_from_its_checkpoint(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = tiny("train_diffusion.py", *common(pictures, run, 8), "--checkpoint.every", 2)
    words += ["--evaluate.every", "100", "--resume", "auto"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with (tmp_path / "out.txt").open("w") as out:
        launcher = subprocess.Popen(
            [*launch, "--max-restarts", "1", ROOT / "train_diffusion.py", *words], stdout=out, stderr=out
        )
    try:
        wait_for(lambda: _steps(run) >= 4, launcher, 200)
        ranks = [
            each for each in psutil.Process(launcher.pid).children() if "train_diffusion.py" in str(each.cmdline())
        ]
        assert len(ranks) == 2
        ranks[1].kill()
        assert launcher.wait(300) == 0, (tmp_path / "out.txt").read_text()
    finally:
        for each in [*psutil.Process().children(recursive=True)]:
            if each.pid == launcher.pid or launcher.pid in {parent.pid for parent in each.parents()}:
                each.kill()
    assert "resuming from" in (tmp_path / "out.txt").read_text()
    assert [record["epoch"] for record in read_metrics(run) if record["kind"] == "epoch"] == [*range(1, 9)]


# -- signals ----------------------------------------------------------------------------------------------


def slow_evaluation() -> None:
    from pretrain.evaluation import validation_loss

    keeping_nothing(impatient)
    call = validation_loss.ValidationLoss.__call__

    def slow(self, model):
        found = call(self, model)
        if int(os.environ.get("RANK", "0")) == int(os.environ.get("SLOW", "0")):
            Path(os.environ["EVALUATES"]).touch()
            time.sleep(SLOW_EVALUATION)
        return found

    validation_loss.ValidationLoss.__call__ = slow


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR2])
def test_every_signal_to_stop_writes_a_checkpoint(number: int, pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*common(pictures, run, 3000), "--evaluate.every", 3000, "--checkpoint.every", 4]
    with Trainers("train_diffusion.py", words, tmp_path / "out.txt", first=keeping_nothing) as trainers:
        trainers.until(lambda: _steps(run) >= 4)
        trainers.send(number, 0)
        assert trainers.wait() == [75]
    stop = re.search(
        rf"stopped by {signal.Signals(number).name} in epoch \d+ after step (\d+)", (tmp_path / "out.txt").read_text()
    )
    assert stop and int(stop[1]) == _steps(run)


@pytest.mark.parametrize(
    ("processes", "told", "slow"),
    [
        pytest.param(1, 0, 0, marks=pytest.mark.slow),
        pytest.param(2, 0, 0, marks=pytest.mark.slow),
        (2, 1, 0),
        pytest.param(2, 0, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_an_evaluation_loses_nothing(
    processes: int, told: int, slow: int, trained: Path, pictures: Path, tmp_path: Path
) -> None:
    """Rank `slow` evaluates, the others wait for it, and rank `told` gets the signal."""
    run = tmp_path / "run"
    words = [*common(pictures, run, 3), *PRUNED, "--evaluate.every", 1]
    environment = {"EVALUATES": str(tmp_path / "evaluates"), "SLOW": str(slow)}
    with Trainers(
        "train_diffusion.py",
        words,
        tmp_path / "out.txt",
        processes=processes,
        first=slow_evaluation,
        environment=environment,
    ) as trainers:
        trainers.until((tmp_path / "evaluates").exists)
        trainers.send(signal.SIGTERM, told)
        assert trainers.wait() == [75] * processes, (tmp_path / "out.txt").read_text()
    output = (tmp_path / "out.txt").read_text()
    assert output.count("stopped by SIGTERM in the evaluation after epoch 1") == 1 and "Traceback" not in output
    train("train_diffusion.py", "--resume", "--output-dir", run)
    records = read_metrics(run)
    assert [record["kind"] for record in records] == [record["kind"] for record in read_metrics(trained)]
    if processes == 1:
        assert records == read_metrics(trained) and same(run, trained)


def test_a_second_signal_has_its_usual_effect() -> None:
    with StopSignal() as stop:
        with pytest.raises(StopRequested), stop.raising():
            signal.raise_signal(signal.SIGUSR2)
        assert stop.signal == signal.SIGUSR2
        with pytest.raises(StopRequested), stop.raising():  # it came before
            raise AssertionError
        for _ in range(3):
            stop.since -= 10
            signal.raise_signal(signal.SIGXCPU)  # which the kernel repeats
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.signal  # as nohup wants it
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stopped_rank_0_is_noticed(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*common(pictures, run, 3000), "--evaluate.every", 3000]
    with Trainers("train_diffusion.py", words, tmp_path / "out.txt", processes=2, first=impatient) as trainers:
        trainers.until(lambda: _steps(run) >= 4)
        trainers.send(signal.SIGSTOP, 0)
        trainers.until(lambda: not trainers.processes[1].is_alive())
    assert trainers.processes[1].exitcode == heartbeat.EXIT_STATUS
    assert re.search(r"rank 0 \(process \d+ on .*\) sent no heartbeat", (tmp_path / "out.txt").read_text())


# -- damaged files --------------------------------------------------------------------------


def test_fewer_epochs_than_were_trained_are_refused(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for epochs in (1, 2):
        output = refused("train_diffusion.py", "--resume", "--output-dir", run, "--epochs", epochs)
        assert f"--epochs {epochs}, but the run is in epoch 3 already; give at least 3" in output
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == {
        path: content for path, content in before.items() if path.name != ".lock"
    }


def test_missing_settings_are_taken_from_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").unlink()
    train("train_diffusion.py", "--resume", "--output-dir", run)
    assert yaml.safe_load((run / "config.yaml").read_text()) == settings | {"output_dir": str(run)}
    (run / "config.yaml").unlink()
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text("{")
    assert "config.yaml is gone, and no checkpoint there has the settings" in refused(
        "train_diffusion.py", "--resume", "--output-dir", run
    )


def test_a_damaged_metrics_log_is_reported_and_keeps_its_complete_lines(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "metrics.jsonl"
    for _ in range(60):
        path.unlink(missing_ok=True)
        log, messages = MetricsLog(path), []
        for number in range(rng.randint(1, 6)):
            log.write("epoch", epoch=number, text="x" * rng.randint(0, 9))
        position, lines = log.position, path.read_bytes().splitlines(keepends=True)
        damage = rng.choice(["cut", "short", "garbled", "none", "number"])
        if damage == "cut":
            path.write_bytes(path.read_bytes()[: rng.randint(0, position - 1)])
        elif damage == "short":
            path.write_bytes(b"".join(line for number, line in enumerate(lines) if number != len(lines) // 2))
        elif damage == "garbled":
            lines[rng.randrange(len(lines))] = rng.choice([b"{\n", b"\0\xff\n", b"[]\n", b"[" * 9999 + b"\n"])
            path.write_bytes(b"".join(lines))
        elif damage == "number":  # in the checkpoint
            position = 10**18
        log = MetricsLog(path, position, log=messages.append)
        assert bool(messages) == (damage != "none"), damage
        log.write("epoch", epoch=99)
        *older, last = MetricsLog(path, writes=False).read("epoch")
        assert last["epoch"] == 99 and log.read("epoch") == [*older, last]
        assert all(
            json.dumps({"kind": "epoch"} | record) + "\n" in b"".join(lines).decode(errors="replace")
            for record in older
        )


def test_images_that_vanish_end_the_run_or_are_reported(pictures: Path, tmp_path: Path, capsys) -> None:
    for gone in (10, 41):
        data, run = tmp_path / f"data{gone}", tmp_path / f"run{gone}"
        shutil.copytree(pictures, data)
        words = [*common(data, run, 2), "--on-bad-image", "skip", "--data.size", "12", "--data.crop", "0.5"]
        train("train_diffusion.py", *words[:5], 1, *words[6:])
        names = sorted(data.rglob("*.png"))
        for victim in names[:gone]:
            victim.write_bytes(b"")
        capsys.readouterr()
        words = [*words, "--overwrite"]
        if gone == 10:
            train("train_diffusion.py", *words)
            assert re.search(r"warning: \d+ of 43 images can't be used and are skipped", capsys.readouterr().out)
        else:
            assert "more than 50%" in refused("train_diffusion.py", *words)
