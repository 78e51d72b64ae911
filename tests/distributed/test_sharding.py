"""A sharded run is the same run."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from conftest import PRUNED, ROOT, tiny
from programs import common, refused, train, train_on, wait_for
from torch import nn

from pretrain.checkpoint import shards, storage
from pretrain.checkpoint.load_run import load_run
from pretrain.core.errors import UserError
from pretrain.distributed.sharding import shard
from pretrain.training.run import Run


def settings(pictures: Path, run: Path, *more: object) -> list[object]:
    words = [*common(pictures, run, 2), *PRUNED, "--ema.sigma-rel", 0.1, "--ema.snapshots", 2]
    return [*words, "--checkpoint.every", 1, "--checkpoint.keep", 99, "--evaluate.metrics", "loss", *more]


@pytest.fixture(scope="module")
def unsharded(pictures: Path, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unsharded") / "run"
    train("train_diffusion.py", *settings(pictures, run))
    return run


def assert_same(one: Path, other: Path) -> None:
    """The last checkpoints hold the same state, up to rounding."""
    states = [storage.newest_whole(run / "checkpoints") for run in (one, other)]
    first, second = (found.state for found in states if found is not None)
    assert first.tensors.keys() == second.tensors.keys() and first.values["step"] == second.values["step"]
    for group in first.tensors:
        mine, theirs = first.read(group), second.read(group)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5, msg=f"{group} {name}")


def resumed_at(run: Path, copy: Path, keep: int) -> list[object]:
    """Settings to continue a copy of a run of which only the first checkpoints are left."""
    shutil.copytree(run, copy)
    for path in sorted((copy / "checkpoints").iterdir())[keep:]:
        shutil.rmtree(path)
    return ["--resume", "--output-dir", copy]


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sharded_run_is_the_unsharded_one(processes: int, pictures: Path, unsharded: Path, tmp_path: Path) -> None:
    sharded, log = tmp_path / "sharded", tmp_path / "output.txt"
    train_on(processes, log, "train_diffusion.py", *settings(pictures, sharded, "--shard"))
    assert_same(unsharded, sharded)
    model = load_run(sharded).model.state_dict()
    for name, value in load_run(unsharded).model.state_dict().items():
        torch.testing.assert_close(value, model[name], rtol=1e-3, atol=1e-5)
    newest = storage.newest(sharded / "checkpoints")
    files = shards.files(newest)
    assert len(files) == processes and not (newest / "model.safetensors").exists()
    assert max(file.stat().st_size for file in files) < (1 / processes + 0.1) * sum(
        file.stat().st_size for file in files
    )
    snapshots = [sorted(path.name for path in (run / "ema").iterdir()) for run in (unsharded, sharded)]
    assert snapshots[0] == snapshots[1] != []
    if processes == 2:
        train("train_diffusion.py", *resumed_at(sharded, tmp_path / "again", 4))
    else:
        train_on(2, log, "train_diffusion.py", *resumed_at(sharded, tmp_path / "again", 4))
    assert_same(unsharded, tmp_path / "again")
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"\x7f")
    found = storage.newest_whole(sharded / "checkpoints")
    assert found is not None and files[1].name in str(found.skipped)


@pytest.mark.slow
def test_an_unsharded_run_is_continued_sharded(pictures: Path, unsharded: Path, tmp_path: Path) -> None:
    words = resumed_at(unsharded, tmp_path / "run", 4)
    train_on(2, tmp_path / "output.txt", "train_diffusion.py", *words, "--shard")
    assert_same(unsharded, tmp_path / "run")


def test_muon_orthogonalizes_whole_matrices(pictures: Path, tmp_path: Path) -> None:
    words = ["--optim.name", "muon", "--optim.clip", 0.05, "--optim.compensation", 0.5, "--model.depth", 2]
    words += ["--optim.lr", 2.25e-3]  # a larger one makes more of rounding: keys' biases have no other gradient
    one, two = tmp_path / "one", tmp_path / "two"
    train("train_mae.py", *settings(pictures, one, *words))
    train_on(2, tmp_path / "output.txt", "train_mae.py", *settings(pictures, two, *words, "--shard"))
    assert_same(one, two)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_sharded_run(pictures: Path, unsharded: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = tiny("train_diffusion.py", *settings(pictures, run, "--shard", "--resume", "auto", "--adapter", "ddpm"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with (tmp_path / "out.txt").open("w") as out:
        launcher = subprocess.Popen(
            [*launch, "--max-restarts", "1", ROOT / "train_diffusion.py", *words], stdout=out, stderr=out
        )
    try:
        wait_for(lambda: len([*(run / "checkpoints").glob("step-*[0-9]")]) >= 3, launcher, 300)
        ranks = [each for each in psutil.Process(launcher.pid).children() if "train_diffusion" in str(each.cmdline())]
        ranks[-1].send_signal(signal.SIGKILL)
        assert launcher.wait(400) == 0, (tmp_path / "out.txt").read_text()
    finally:
        launcher.kill()
    assert re.search(r"resuming from .*step-\d+", (tmp_path / "out.txt").read_text())
    assert_same(unsharded, run)


@pytest.mark.parametrize("words", [("--precision", "fp16"), ("--micro-batch", "auto"), ("--blocking.share", 0.5)])
def test_what_sharding_excludes_is_refused(words: tuple[object, ...], pictures: Path, tmp_path: Path) -> None:
    assert "shard excludes" in refused("train_diffusion.py", *common(pictures, tmp_path / "run"), "--shard", *words)


def test_a_parameter_without_dimensions_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match=r"scale .* the shape \(1,\)"):
        shard(model, torch.device("cpu"))


@pytest.mark.parametrize(("main", "due"), [(True, True), (True, False), (False, True)])
def test_only_the_process_that_writes_checkpoints_says_when_one_is_due(main: bool, due: bool) -> None:
    """The others never write one, so for them one is always due after `checkpoint.minutes`."""
    nonfinite = Mock(**{"bad_samples.return_value": set(), "reason_to_stop.return_value": ""})
    state = SimpleNamespace(nonfinite=nonfinite, step=0)
    writer, stop_signal = SimpleNamespace(due=due), SimpleNamespace(signal=0)
    run = SimpleNamespace(state=state, writer=writer, stop_signal=stop_signal, is_main=main)
    assert Run.inspect(run, 0) == (0, main and due)  # pyright: ignore[reportArgumentType]
