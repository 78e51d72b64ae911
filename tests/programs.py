"""The programs, run in this process, and readers of their files."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file

import train_diffusion
import train_mae
from pretrain.checkpoint import storage
from pretrain.config.cli import parse
from pretrain.core.errors import UserError
from pretrain.training.flops import SampleCost, profile_sample
from tests.faults.trainers import HANGS, Trainers

PROGRAMS = {"train_diffusion.py": train_diffusion, "train_mae.py": train_mae}


def train(script: str, *arguments: object) -> None:
    """The program's main in this process."""
    words = tiny(script, *arguments)
    PROGRAMS[script].main(parse(words, **PROGRAMS[script].START, output_dir="runs/x", help=""))


def train_on(processes: int, log: Path, script: str, *arguments: object) -> str:
    """The output of a launch of several processes, which are forked from a server that has imported everything."""
    with Trainers(script, arguments, log, processes=processes) as trainers:
        statuses = trainers.wait()
    assert statuses == [0] * processes, log.read_text()
    return log.read_text()


def common(pictures: Path, output: Path, epochs: int = 4) -> list[object]:
    return ["--data", pictures, "--output-dir", output, "--epochs", epochs, "--batch-size", 12, "--evaluate.every", 2]


def final(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    newest = storage.newest(folder / "checkpoints")
    assert newest is not None
    return load_file(newest / f"{name}.safetensors")


def same(one: Path, other: Path) -> bool:
    """Bit for bit."""
    names = ("model", "ema", "optimizer", "infobatch", "times_used")
    pairs = [(final(one, name), final(other, name)) for name in names]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a) for a, b in pairs
    )


def refused(script: str, *arguments: object) -> str:
    with pytest.raises(UserError) as refusal:
        train(script, *arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def wait_for(condition, process: subprocess.Popen, seconds: float = HANGS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the program ended or hangs"
        time.sleep(0.02)


def profile_config(config: Any, adapter: Any, shape: tuple[int, int, int], classes: int) -> SampleCost:
    """The cost of a sample of a network, from its settings, without memory for it."""
    with torch.device("meta"):
        model = config.build(shape, classes)
    return profile_sample(adapter, model, shape, classes)
