"""Shared by the tests: small images, and the programs as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: sums of floats depend on the number of threads
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(
    prefix="config-"
)  # tests must not change the user's list of trusted files

ROOT = Path(__file__).parents[1]
PRUNED = ("--pruning.policy", "infobatch")  # samples are pruned, levels are not, with annealing: the paper's method
TINY = {
    "train_diffusion.py": "--optim.name adamw --optim.lr 3e-3 --model.channels 8 16 --model.layers 1 "
    "--model.attention 0 --evaluate.images 4 --evaluate.steps 2",
    "train_mae.py": "--model.patch 4 --model.width 16 --model.depth 1 --model.heads 2 --model.decoder-width 16 "
    "--model.decoder-depth 1 --model.decoder-heads 2 --evaluate.images 4 --evaluate.no-at-start",
}


def tiny(script: str, *arguments: object) -> list[str]:
    """The command line of a tiny run: DDPM, unless the arguments say otherwise, or name a recipe or run that does."""
    words = [*TINY.get(script, "").split(), *map(str, arguments)]
    if script == "train_diffusion.py" and not {"--adapter", "--config", "--resume"} & set(words):
        words += ["--adapter", "ddpm"]
    return words


def draw_images(folder: Path, count: int, size: int = 12, classes: int = 2) -> Path:
    """A folder of grey images of one class each: squares and discs at random positions, of random brightness."""
    rng = np.random.default_rng(0)
    for number in range(count):
        kind = number % classes
        image = Image.new("L", (size, size))
        x, y = rng.integers(0, size // 2, 2).tolist()
        box = (x, y, x + size // 2, y + size // 2)
        pen = ImageDraw.Draw(image)
        (pen.rectangle if kind == 0 else pen.ellipse)(box, fill=int(rng.integers(80, 255)))
        path = folder / f"class {kind}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """47 images of 12 x 12, two classes: 43 for training, a prime number, and 4 for validation."""
    return draw_images(tmp_path_factory.mktemp("pictures"), 47)


@pytest.fixture(scope="session")
def program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script, or a command of `pretrain`; `processes` > 1 under torchrun, or under `accelerate launch`."""

    def call(
        script: str,
        *arguments: object,
        processes: int = 1,
        accelerate: bool = False,
        cwd: Path = ROOT,
        check: bool = True,
    ):
        words = tiny(script, *arguments) if "--help" not in arguments else ["--help"]
        python = [sys.executable]
        if accelerate:
            launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
            python += [*launch, "--num_processes", str(processes), "--main_process_port", "0"]
        elif processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        python += [str(ROOT / script)] if script.endswith(".py") else ["-m", "pretrain", script]
        environment = {**os.environ, "COLUMNS": "120"}
        done = subprocess.run([*python, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def default_sigchld() -> Iterator[None]:
    """Without torch's handler of SIGCHLD.

    Any DataLoader with workers that this process made in its main thread has installed it. It raises wherever the main
    thread is when a worker dies; a trainer's process does not have it.
    """
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pictures: Path) -> Path:
    """An uninterrupted run, with a checkpoint at every step."""
    from programs import common, train

    folder = tmp_path_factory.mktemp("finished") / "run"
    every = ["--checkpoint.every", 1, "--checkpoint.keep", 1000, "--micro-batch", 6]
    train("train_diffusion.py", *common(pictures, folder), *every, *PRUNED)
    return folder


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's metrics.jsonl without `seconds`."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]
