"""A picture that can't be made does not end a training, and one that can't be written is one sentence."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import common, train

from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.mae import MAE
from pretrain.config.schema import Evaluate
from pretrain.core.errors import UserError
from pretrain.evaluation import previews, visualize


def test_an_exception_is_a_warning_and_a_mistake_of_the_user_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> Any:
        raise error

    for error in (ValueError("no\nway"), torch.OutOfMemoryError("much"), KeyError("x"), StopIteration()):
        assert previews.attempt(lambda error=error: fail(error)) is None
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"the picture can't be made ({type(error).__name__}: " in said
    with pytest.raises(UserError, match="repair it"):
        previews.attempt(lambda: fail(UserError("repair it")))
    with pytest.raises(KeyboardInterrupt):
        previews.attempt(lambda: fail(KeyboardInterrupt()))  # type: ignore[arg-type]
    assert previews.attempt(lambda: 3) == 3


@pytest.mark.parametrize("script", ["train_diffusion.py", "train_mae.py"])
def test_a_training_goes_on_without_its_picture(
    script: str, pictures: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no picture today")

    monkeypatch.setattr(previews, "generate", fail)
    monkeypatch.setattr(MAE, "reconstruct", fail)
    train(script, *common(pictures, tmp_path / "run", 1))
    assert "the picture can't be made (RuntimeError: no picture today)" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not [*(tmp_path / "run" / "pictures").glob("epoch-*")]


def test_settings_that_would_fail_later_fail_at_once() -> None:
    with pytest.raises(UserError, match=r"--evaluate.guidance 2 needs"):
        previews.GeneratedImages(DDPM(), (1, 8, 8), 0, Evaluate(images=4, steps=2, guidance=2.0), 0)


def test_pictures_that_find_no_place_are_one_sentence(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    train("train_mae.py", *common(pictures, tmp_path / "run", 1))
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"^--output-dir .*file/sheets: the pictures can't be written there: .*Not a dir"
    ):
        visualize.main(tmp_path / "run", n=2, output_dir=tmp_path / "file" / "sheets")
    shutil.rmtree(tmp_path / "run" / "pictures")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(UserError, match=r"^--output-dir .*pictures: the pictures can't be written there: .*No space"):
        visualize.main(tmp_path / "run", n=2)
    assert not [*(tmp_path / "run" / "pictures").iterdir()]
