"""The commands for finished runs: they follow no link out of a run's folder, and a full or read-only disk is one
sentence.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from autoencoders import encode, kl
from programs import common, train

from pretrain.checkpoint import ema_snapshots
from pretrain.core.errors import UserError
from pretrain.data.find import EMBEDDED
from pretrain.evaluation import coreset, evaluate, generate, visualize
from pretrain.export import export
from tests.faults.test_disks import disk, fill, mount  # noqa: F401 — disk is a fixture


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each program, and what `encode-latents` needs."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["--evaluate.metrics", "loss"]
    train("train_diffusion.py", *common(pictures, folder / "diffusion", 1), "--ema.sigma-rel", "0.1", *words)
    kl().save_pretrained(folder / "vae")
    train("train_mae.py", *common(pictures, folder / "mae", 1), *words)
    return folder


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "visualize": lambda runs: visualize.main(runs / "mae", n=2),
    "generate": lambda runs: generate.main(runs / "diffusion", num_images=1, steps=1),
    "evaluate": lambda runs: evaluate.main([str(runs / "diffusion"), "--metrics", "loss"]),
    "export": lambda runs: export.main(runs / "mae"),
    "encode-latents": lambda runs: encode(runs / "vae", EMBEDDED["fashion-mnist"], runs / "latents", size=8, limit=8),
    "coreset": lambda runs: coreset.main(runs / "mae", 0.5, "random", runs / "subset.json"),
    "ema": lambda runs: ema_snapshots.main(runs / "diffusion", 0.1, runs / "diffusion" / "ema.safetensors"),
}
PLACES = {
    "visualize": ["mae/pictures", "mae/pictures/map.png", "mae/pictures/attention.png.part"],
    "generate": ["diffusion/generated"],
    "evaluate": ["diffusion/evaluation.json", "diffusion/evaluation.json.part"],
    "export": ["mae/model", "mae/model/config.json", "mae/model/transformers", "mae/model/model.safetensors.part"],
    "coreset": ["subset.json", "subset.json.part"],
    "ema": ["diffusion/ema.safetensors", "diffusion/ema.safetensors.part"],
}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", PLACES)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_command_follows_no_link(command: str, dangling: bool, runs: Path, tmp_path: Path) -> None:
    """It is refused in one sentence, or a file of the run's own takes the link's place."""
    for number, place in enumerate(PLACES[command]):
        copy, outside = shutil.copytree(runs, tmp_path / f"{number}"), tmp_path / f"outside{number}"
        link = copy / place
        outside.mkdir()
        target = outside / "target"
        if link.is_dir():
            shutil.move(link, target)
        else:
            shutil.move(link, target) if link.exists() else target.write_bytes(b"[]")
        if place == "diffusion/generated":
            target.unlink()
            target.mkdir()
        if dangling:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        link.symlink_to(target)
        before = contents(outside)
        try:
            COMMANDS[command](copy)
        except UserError as error:
            assert f"{link} is a link" in str(error) and "\n" not in str(error)
        else:
            assert not link.is_symlink()
        assert contents(outside) == before and [*outside.iterdir()] == ([] if dangling else [target])


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_command_on_a_disk_that_is_full_or_read_only(state: str, runs: Path, disk: Path) -> None:  # noqa: F811
    shutil.copytree(runs, disk / "runs")
    before = contents(disk / "runs")
    if state == "full":
        fill(disk)
    else:
        assert mount("-o", "remount,ro", disk)
    for command, run in COMMANDS.items():
        with pytest.raises(UserError) as refusal:
            run(disk / "runs")
        message = str(refusal.value)
        assert ("No space left" if state == "full" else "Read-only file system") in message, (command, message)
        assert "\n" not in message and str(disk) in message, message
        after = contents(disk / "runs")
        if command != "export" or state == "read-only":  # of an export what was written before may be there
            assert {path: content for path, content in after.items() if path in before} == before, command
        assert not [path for path in after if path.name.endswith(".part")], command
