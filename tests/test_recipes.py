"""The recipes build and cost what docs/training.md says; the README's own, minutes each, reach what they should."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from programs import profile_config, wait_for

from pretrain.config.cli import parse
from pretrain.data.sources import open_data

ROW = re.compile(
    r"^\| `(\w+)` \| ([\d,]+) of (\d+)x(\d+)x(\d+)(?:, (\d+) classes)? "
    r"\| ([\d.]+) M \| ([\d.]+) GFLOP \| ([\d.e+]+) \|",
    re.M,
)
ROWS = {row[0]: row[1:] for row in ROW.findall((ROOT / "docs" / "training.md").read_text())}


def test_every_recipe_is_documented_with_its_command() -> None:
    text, recipes = (ROOT / "docs" / "training.md").read_text(), sorted((ROOT / "configs").glob("*.yaml"))
    assert sorted(ROWS) == [path.stem for path in recipes]
    for path in recipes:
        commands = re.findall(r"^# ((?:python|torchrun) .*)$", path.read_text(), re.M)
        assert commands and all(command in text for command in commands), path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith(("mae_l", "mae_h"))) for name in ROWS]
)
def test_a_recipe_has_the_documented_parameters_and_flops(name: str) -> None:
    """Built without memory; parameters, FLOPs of a sample and of full training, to the given digits."""
    size, *shape, classes, parameters, visit, full = ROWS[name]
    recipe = ROOT / "configs" / f"{name}.yaml"
    config = parse([], adapter="", model="", recipe=recipe, output_dir="x", help="")
    assert config.class_conditional == bool(classes)
    images: tuple[int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]))
    with torch.device("meta"):
        model = config.component("model").build(images, int(classes or 0))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    flops = profile_config(config.component("model"), config.component("adapter"), images, int(classes or 0)).flops
    total = flops * int(size.replace(",", "")) * config.epochs
    for message, counted in ((parameters, millions), (visit, flops / 1e9), (full, total)):
        assert float(message) == float(f"{counted:.3g}") or float(message) == float(f"{counted:.2g}"), (
            message,
            counted,
        )


def test_the_data_that_ships_is_as_the_table_says() -> None:
    config = parse([], adapter="", model="", recipe=ROOT / "configs/fashion_mnist_ddpm.yaml", output_dir="x", help="")
    source = open_data(config.data, 0)
    assert (f"{len(source.train):,}", *map(str, source.shape)) == ROWS["fashion_mnist_ddpm"][:4]


STUBS = {
    "scontrol": 'if [[ $1 == show ]]; then echo node7; echo node8; else echo "$@" >> "$HERE/requeued"; fi',
    "scancel": 'echo "$@" > "$HERE/cancelled"; kill -TERM $(cat "$HERE/pid")',
    "srun": 'shift; SLURM_NODEID=1 exec "$@"',
    "accelerate": 'echo "$@" > "$HERE/part"; echo $$ > "$HERE/pid"; mv "$HERE/part" "$HERE/arguments"\n'
    'trap "exit 1" TERM; for n in $(seq ${SECONDS_TO_RUN:-0}0); do sleep 0.1; done',
}


@pytest.mark.parametrize("stopped", [False, True])
def test_the_slurm_script_starts_resumes_and_requeues(stopped: bool, tmp_path: Path) -> None:
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path)}
    words = ["--infobatch", "--output-dir", str(tmp_path / "run")]
    command = ["bash", str(ROOT / "examples" / "slurm" / "train.sbatch")]
    if stopped:
        environment["SECONDS_TO_RUN"] = "60"
    job = subprocess.Popen([*command, *words], env=environment, cwd=tmp_path)
    if stopped:
        wait_for((tmp_path / "arguments").exists, job)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == (1 if stopped else 0)
    start = "launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank 1 --main_process_ip node7 "
    start += "--main_process_port 24711 train_diffusion.py "
    more = [*words, "--resume", "auto"]  # the same command, whatever there is
    assert (tmp_path / "arguments").read_text() == start + " ".join(more) + "\n"
    assert (tmp_path / "requeued").exists() == stopped
    if not stopped:
        none = subprocess.run([*command, "--infobatch"], env=environment, capture_output=True, text=True, check=False)
        assert none.returncode == 2 and none.stderr.startswith("error: give --output-dir")


def run(script: str, folder: Path, *words: object) -> dict:
    command = [sys.executable, ROOT / script, "--output-dir", folder, *words]
    subprocess.run(command, check=True, capture_output=True, timeout=1500)
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_diffusion_recipe(tmp_path: Path) -> None:
    summary = run("train_diffusion.py", tmp_path / "first", "--infobatch", "--evaluate.at-start")
    assert summary["dataset_size"] == 6000 and summary["saved_fraction"] > 0.2
    assert summary["quality"]["validation_loss"] < 0.262 < summary["quality_before"]["validation_loss"]
    recipe = ROOT / "configs" / "fashion_mnist_ddpm.yaml"
    words = ["--config", recipe, "--infobatch", "--evaluate.at-start"]
    summary = run("train_diffusion.py", tmp_path / "pruned", *words)
    assert summary["saved_fraction"] > 0.1
    assert summary["quality"]["validation_loss"] < 0.055 < summary["quality_before"]["validation_loss"]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_mae_recipe(tmp_path: Path) -> None:
    summary = run("train_mae.py", tmp_path / "run", "--evaluate.at-start")
    assert summary["dataset_size"] == 6000
    assert summary["quality"]["knn_accuracy"] > summary["quality_before"]["knn_accuracy"] + 0.08
