"""Runs that start from weights: their first validation loss, and that they need the weights at the start only."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from conftest import read_metrics
from programs import PROGRAMS, common, same, tiny, train

import train_diffusion
from pretrain.checkpoint.load_run import load_run
from pretrain.config.build import build_model
from pretrain.config.cli import parse
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.export import denoiser_weights, mae_weights
from pretrain.export.model_card import recipe

MAE_ALONE = ("embed.", "mask_token", "decoder.", "norm.", "out.")  # not of the exported encoder

OBJECTIVES = {
    "flow": "train_diffusion.py --adapter flow --class-conditional",
    "predicted images": "train_diffusion.py --adapter flow --adapter.prediction sample --ema.sigma-rel 0.1",
    "edm with uncertainty": "train_diffusion.py --adapter edm --adapter.uncertainty",
    "mae": "train_mae.py --adapter mae",
}


@pytest.fixture(scope="module")
def first(pictures: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of an epoch with an objective."""

    @cache
    def made(objective: str) -> Path:
        run = tmp_path_factory.mktemp("first") / "run"
        script, *words = OBJECTIVES[objective].split()
        train(script, *common(pictures, run, epochs=1), *words, "--optim.lr", "1e-2")
        return run

    return made


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_is_what_load_run_opens(objective: str, first) -> None:
    """The folder, a checkpoint, a file in it and the export: the parameters are those of the EMA."""
    run = first(objective)
    loaded = load_run(run)
    newest = max((run / "checkpoints").iterdir())
    for path in run, newest, newest / "ema.safetensors", run / "model":
        model = build_model(loaded.config, loaded.shape, loaded.classes)
        if objective == "mae":
            message = mae_weights.start_from(model, path, loaded.config.model.encoder)
        else:
            message = denoiser_weights.start_from(model, loaded.adapter, path)
        assert message.startswith(f"--model.init {path}: initialised the ") and "; it predicted" not in message
        exported = path.name == "model"  # without what the objective alone needs: a head, a decoder
        assert ("by the EMA of step-00000004" in message) == (path.is_dir() and not exported)
        left = {"edm with uncertainty": ("log_error.",), "mae": MAE_ALONE}.get(objective, ()) if exported else ()
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value) != name.startswith(left), (path, name)


@pytest.mark.parametrize("objective", ["flow", "mae"])
def test_a_run_goes_on_where_another_one_ended(objective: str, first, pictures: Path, tmp_path: Path, capsys) -> None:
    """Before its first step it has the validation loss with which the other one ended."""
    script, *words = OBJECTIVES[objective].split()
    words += ["--evaluate.at-start", "--model.init", first(objective)]
    train(script, *common(pictures, tmp_path / "run", epochs=1), *words)
    assert "initialised the" in " ".join(capsys.readouterr().out.split())
    there, here = (
        [record["validation_loss"] for record in read_metrics(run) if record["kind"] == "evaluation"]
        for run in (first(objective), tmp_path / "run")
    )
    assert len(here) == 2 and here[0] == pytest.approx(there[-1], rel=1e-6)


@pytest.mark.parametrize("objective", ["flow", "mae"])
def test_the_weights_are_needed_at_the_start_only(objective: str, first, pictures: Path, tmp_path: Path) -> None:
    """A run is resumed and exported without them; its card names them by their last name."""
    script, *words = OBJECTIVES[objective].split()
    weights, one = tmp_path / "w.safetensors", tmp_path / "one"
    shutil.copy(max((first(objective) / "checkpoints").iterdir()) / "ema.safetensors", weights)
    words += ["--model.init", weights, "--checkpoint.every", 1, "--checkpoint.keep", 99]
    train(script, *common(pictures, one, epochs=1), *words, "--resume", "auto")
    weights.unlink()
    for resume in (["--resume"], ["--resume", "auto"]):
        run = tmp_path / resume[-1]
        shutil.copytree(one, run)
        for checkpoint in sorted((run / "checkpoints").iterdir())[2:]:
            shutil.rmtree(checkpoint)
        train(script, *common(pictures, run, epochs=1), *words, *resume)
        assert same(one, run)
    card = (one / "model" / "README.md").read_text()
    assert "It started from the weights `w.safetensors` and was trained" in card
    assert str(tmp_path) not in (one / "model" / "recipe.yaml").read_text()
    assert yaml.safe_load((one / "config.yaml").read_text())["model"]["init"] == str(weights)


@pytest.mark.parametrize("script", PROGRAMS)
def test_weights_that_can_not_be_read_end_the_program(script: str, pictures: Path, tmp_path: Path, capsys) -> None:
    """With status 2 and one line, before anything is written."""
    (tmp_path / "pointer").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for path, message in ((tmp_path / "pointer", "Git LFS pointer"), (tmp_path / "no", "there is no such file")):
        words = tiny(script, *common(pictures, tmp_path / "run"), "--model.init", path)
        with pytest.raises(SystemExit) as left, exit_on_user_error():
            PROGRAMS[script].main(parse(words, **PROGRAMS[script].START, output_dir="runs/x", help=""))
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.startswith(f"error: --model.init {path}: ") and message in said
        assert said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_the_network_inside_a_sparse_one_starts_from_weights(
    finished: Path, pictures: Path, tmp_path: Path, capsys
) -> None:
    sizes = "--adapter ddpm --model nm --model.unet.layers 1 --model.unet.attention 0 --evaluate.images 4"
    words = ["--data", pictures, "--output-dir", tmp_path / "run", "--epochs", 1, "--batch-size", 12, *sizes.split()]
    words += ["--evaluate.steps", 2, "--model.unet.init", finished, "--model.unet.channels"]
    for channels in (["16"], ["8", "16"]):
        config = parse([*map(str, words), *channels], **train_diffusion.START, output_dir="runs/x", help="")
        if len(channels) == 1:
            with pytest.raises(UserError, match=r"its network has .*; give --model\.unet\.channels 8 16$"):
                train_diffusion.main(config)
        else:
            train_diffusion.main(config)
    assert f"--model.unet.init {finished}: initialised the network by the EMA" in " ".join(
        capsys.readouterr().out.split()
    )
    assert recipe(config)["model"]["unet"]["init"] == "run" and (tmp_path / "run" / "summary.json").exists()
