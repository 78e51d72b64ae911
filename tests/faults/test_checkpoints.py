"""Runs whose checkpoints can't be written for a while, or are damaged."""

import re
import resource
import shutil
from pathlib import Path

import torch
from conftest import PRUNED, read_metrics
from programs import common, refused, same, train

from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import load_run


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-????????"))


def test_a_disk_that_is_full_for_a_while_changes_nothing(
    pictures: Path, finished: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    step, calls = torch.optim.AdamW.step, [0]

    def stepped(self, *arguments, **more):
        calls[0] += 1
        if calls[0] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
        if calls[0] == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return step(self, *arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    words = [*common(pictures, tmp_path / "run"), *PRUNED, "--micro-batch", 6, "--checkpoint.every", 1]
    try:
        train("train_diffusion.py", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    out = capsys.readouterr().out
    assert re.search(r"warning: .*File too large; the training continues, the last checkpoint is step-0000000\d", out)
    assert same(finished, tmp_path / "run") and read_metrics(finished) == read_metrics(tmp_path / "run")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_resumed(
    finished: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in sorted((folder / "checkpoints").iterdir())[-3:]:
        content = bytearray((path / "optimizer.safetensors").read_bytes())
        content[-5] ^= 4
        (path / "optimizer.safetensors").write_bytes(content)
    (folder / "checkpoints" / "step-00000099.part").mkdir()
    (path.with_suffix(".damaged") / "of an earlier time").mkdir(parents=True)
    steps = [path.name for path in sorted(folder.glob("checkpoints/step-????????"))]
    load_run(folder)  # as the commands do
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 4 and all(line.endswith(f"using {steps[-4]}") for line in message)
    assert message[0].startswith(f"warning: {steps[-1]} is not used: the bytes of optimizer.safetensors are not those")
    train("train_diffusion.py", "--resume", "--output-dir", folder)
    out = capsys.readouterr().out
    assert out.count("the bytes of optimizer.safetensors are not those that were written (SHA-256)") == 3
    assert "not used: step-00000099.part: it was not written completely" in out
    assert same(finished, folder) and read_metrics(finished) == read_metrics(folder)
    left = {path.suffix for path in (folder / "checkpoints").iterdir()}
    assert left == {"", ".damaged"}
    newest = str(storage.newest(folder / "checkpoints"))
    Path(newest, "state.json").unlink()
    assert "state.json is missing; --resume without a path uses" in refused("train_diffusion.py", "--resume", newest)
