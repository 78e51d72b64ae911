"""The folder of a run: it is replaced only where a run wrote it, and resumed by its own checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics
from programs import common, refused, same, train

import train_diffusion
from pretrain.checkpoint import run_dir, storage
from pretrain.config.cli import parse


def test_a_folder_that_holds_another_run(pictures: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "the folder has a run; continue it (--resume)" in refused("train_diffusion.py", *common(pictures, folder))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train("train_diffusion.py", *common(pictures, folder, 1), "--overwrite")
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 1
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000000", "step-00000004"]


@pytest.mark.parametrize("cut", range(len(run_dir.FILES)))
def test_an_interrupted_overwrite_can_be_repeated(cut: int, finished: Path, tmp_path: Path, monkeypatch) -> None:
    """At any point of the removal, the folder is still recognized as a run's."""
    removed: list[Path] = []

    def until(real: Any) -> Any:
        def remove(path: Path, **options: Any) -> None:
            if len(removed) == cut:
                raise KeyboardInterrupt
            removed.append(path)
            real(path, **options)

        return remove

    shutil.copytree(finished, tmp_path / "run")
    words = ["--output-dir", str(tmp_path / "run"), "--overwrite"]
    config = parse(words, **train_diffusion.START, output_dir="", help="")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", until(shutil.rmtree))
        patch.setattr(Path, "unlink", until(Path.unlink))
        run_dir.prepare(config, None)
        raise KeyboardInterrupt  # if there was less to remove
    run_dir.prepare(config, None)


def test_a_folder_with_something_else_is_never_overwritten(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for more in ([], ["--overwrite"]):
        assert "'thesis.tex', which no run wrote" in refused("train_diffusion.py", *common(pictures, tmp_path), *more)
    (tmp_path / "thesis.tex").rename(tmp_path / "file")
    assert "it is a file" in refused("train_diffusion.py", *common(pictures, tmp_path / "file"))


def test_a_folder_that_is_no_run_is_never_overwritten(pictures: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "run" / "pictures")
    for more in ([], ["--overwrite"]):
        inside = common(tmp_path / "run" / "pictures", tmp_path / "run")
        assert "is inside it" in refused("train_diffusion.py", *inside, *more)
        assert "which no run wrote" in refused("train_diffusion.py", *common(pictures, tmp_path / "run"), *more)
    assert len(list((tmp_path / "run").rglob("*.png"))) == 47


def test_a_checkpoint_is_resumed_in_its_own_run(finished: Path, tmp_path: Path) -> None:
    (step,) = (path for path in (finished / "checkpoints").iterdir() if path.name.endswith("05"))
    words = ["--resume", step, "--output-dir", tmp_path / "other"]
    assert "is not of the run in --output-dir" in refused("train_diffusion.py", *words)
    for nowhere in ("/x", "x", tmp_path):
        assert "there is no such checkpoint" in refused("train_diffusion.py", "--resume", nowhere)
    shutil.copytree(finished, tmp_path / "run")
    train("train_diffusion.py", "--resume", tmp_path / "run" / "checkpoints" / step.name)
    assert same(finished, tmp_path / "run") and read_metrics(finished) == read_metrics(tmp_path / "run")


def test_a_config_does_not_hide_whose_checkpoint_it_is(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "one")
    shutil.copytree(finished, tmp_path / "other")
    step = min((tmp_path / "one" / "checkpoints").iterdir())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = ["--config", tmp_path / "one" / "config.yaml", "--resume", step, "--output-dir", tmp_path / "other"]
    assert "is not of the run in --output-dir" in refused("train_diffusion.py", *words)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_checkpoint_below_the_home_folder(finished: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(finished, tmp_path / "run")
    (step,) = (path for path in (finished / "checkpoints").iterdir() if path.name.endswith("05"))
    train("train_diffusion.py", "--resume", f"~/run/checkpoints/{step.name}")
    assert same(finished, tmp_path / "run")


@pytest.mark.parametrize("config", ["name: somebody's\n", "- a\n", "[", "adapter: x\nmodel: y\n"])
def test_a_folder_of_another_program_is_not_a_run(config: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "weights.bin").write_bytes(b"years of work")
    (tmp_path / "run" / "config.yaml").write_text(config)
    words = [*common(pictures, tmp_path / "run"), "--overwrite"]
    assert "which no run wrote" in refused("train_diffusion.py", *words)
    assert (tmp_path / "run" / "model" / "weights.bin").read_bytes() == b"years of work"


def test_nothing_to_resume(pictures: Path, tmp_path: Path) -> None:
    assert "has no checkpoint" in refused("train_diffusion.py", *common(pictures, tmp_path / "run"), "--resume")


def test_a_checkpoint_of_another_model_adapter_or_data_set(pictures: Path, finished: Path, tmp_path: Path) -> None:
    resume = ["--resume", "--output-dir", finished]
    assert "model.channels is [8, 16] there, [16, 16] here" in refused(
        "train_diffusion.py", *resume, "--model.channels", 16, 16
    )
    assert "of another adapter" in refused("train_diffusion.py", *resume, "--adapter", "flow")
    shutil.copytree(pictures, tmp_path / "less")
    next((tmp_path / "less").rglob("*.png")).unlink()
    sentence = refused("train_diffusion.py", *resume, "--data", tmp_path / "less")
    assert "the data set has changed: 43 images then, 42 now" in sentence
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = storage.newest(folder / "checkpoints")
    assert newest is not None
    state = storage.load(newest)
    state.tensors["model"] = {"x": torch.zeros(1)}
    storage.save(folder / "checkpoints", int(newest.name[5:]), state, keep=1)
    assert "of another model" in refused("train_diffusion.py", "--resume", "--output-dir", folder)
