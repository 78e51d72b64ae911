"""What the programs can't use is a UserError in one sentence, and nothing is written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from programs import common, final, refused, train

import train_diffusion
import train_mae
from pretrain.config.cli import parse
from pretrain.core.errors import UserError, exit_on_user_error
from pretrain.distributed import launch


@pytest.mark.parametrize(("way", "flag"), [("FSDP", "true"), ("DEEPSPEED", "1")])
def test_other_sharding_is_refused(way: str, flag: str, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", flag)
    message = refused("train_diffusion.py", *common(pictures, tmp_path / "run"))
    assert f"launched with {way}, whose settings are not used here" in message and not (tmp_path / "run").exists()


TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        *(({name: "x"}, f"{name} must be a whole number") for name in launch.NUMBERS),
        *(({**TWO, name: ""}, name) for name in TWO),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set and WORLD_SIZE is not"),
        (TWO | {"RANK": "2"}, "RANK must be below 2"),
        (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT must be a whole number from 0 to 65,535"),
        (TWO, "can't meet at MASTER_ADDR 127.0.0.1, MASTER_PORT 29500: no route"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "give --compile instead"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "give --shard"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "give --precision bf16"),
    ],
)
def test_variables_of_launchers_that_are_wrong(
    environment: dict[str, str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Whichever process notices it: one sentence, also if its rank is not to be read."""

    def alone(**_: object) -> None:
        raise torch.distributed.DistNetworkError("no route\nC++ stack")

    monkeypatch.setattr(launch, "Accelerator", alone)
    monkeypatch.setattr(launch, "PartialState", alone)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for begin in (lambda: launch.start(tmp_path / "run", "no", None), launch.join):
        if "ACCELERATE" in str(environment) and begin is launch.join:
            continue
        with pytest.raises(SystemExit) as left, exit_on_user_error():
            begin()
        said = capsys.readouterr().err
        assert left.value.code == 2 and message in said and said.count("\n") == 1 and said.startswith("error: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("--config", "NAME/a.yaml"),
        ("--adapter", "NAME/a.py"),
        ("--resume", "NAME/checkpoints/step-1"),
        ("--data", "NAME"),
        ("--output-dir", "NAME"),
    ],
)
@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EACCES])
def test_a_path_that_the_system_refuses_is_one_sentence(
    setting: str, path: str, number: int, pictures: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Too long, or in a folder of another user; Path.exists() raises for both."""
    folder = tmp_path / ("n" * (256 if number == errno.ENAMETOOLONG else 9))
    stat = os.stat

    def refusing(path, *arguments, **more):
        if isinstance(path, (str, os.PathLike)) and str(folder) in str(path) and number == errno.EACCES:
            raise PermissionError(number, os.strerror(number), str(path))
        return stat(path, *arguments, **more)

    monkeypatch.setattr(os, "stat", refusing)
    words = [*common(pictures, tmp_path / "run"), setting, path.replace("NAME", str(folder))]
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        train("train_diffusion.py", *words)
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ") and str(folder) in said
    assert os.strerror(number) in said and not (tmp_path / "run").exists()


def test_a_loop_of_links_is_one_sentence(pictures: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        train("train_diffusion.py", *common(pictures, tmp_path / "loop"))
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and str(tmp_path / "loop") in said


def test_a_user_error_is_one_line_and_exit_status_2(tmp_path: Path, program) -> None:
    """Before and after the large imports."""
    for arguments in (("--optim.lrr", "3"), ("--data", "./not/there")):
        done = program("train_diffusion.py", *arguments, "--output-dir", tmp_path / "run", check=False)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.channels 8 16 16 16", "8 divides, got 12x12"),
        ("--micro-batch many", "--micro-batch must be a whole number or auto, got 'many'"),
        ("--batch-size 10 --micro-batch 4", "--micro-batch 4 does not divide the 10 images"),
        ("--precision fp16", "fp16"),
        ("--tracker nonsense", "nonsense"),
        ("--adapter ddpm --evaluate.steps 2000", "--evaluate.steps 2000"),
        (
            "--pruning.policy infobach",
            "did you mean infobatch? There are full, random, infobatch, quantile, importance",
        ),
        ("--evaluate.sampler heunn", "one of ddim, euler, heun, dpm++, got heunn"),
        ("--pruning.policy ./mine.py", "there is no such file"),
        ("--pruning.policy tests/conftest.py", "exactly one function whose arguments begin with (score, stats)"),
        ("--pruning.policy random", "needs a budget"),
        (
            "--pruning.policy infobatch --pruning.budget 0.5",
            "infobatch takes no budget (it has no keyword-only argument share); random, importance do",
        ),
        ("--pruning.policy importance --pruning.budget 0.1", "budget must be at least"),
        (
            "--pruning.policy importance --pruning.over samples --pruning.budget 0.9 --pruning.prune-ratio 0.5",
            "has no setting 'prune_ratio'",
        ),
        ("--data.channels 1 --class-conditional --data ./nowhere/at/all", "there is no such file"),
    ],
)
def test_settings_that_do_not_fit_raise(arguments: str, message: str, pictures: Path, tmp_path: Path) -> None:
    sentence = refused("train_diffusion.py", *common(pictures, tmp_path / "run"), *arguments.split())
    assert message in sentence and sentence.count("--pruning.policy") <= 1
    assert not (tmp_path / "run").exists()


def test_missing_or_unused_labels_raise(pictures: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(pictures.rglob("*.png"))):
        shutil.copy(path, flat / f"{number}.png")
    words = [*common(flat, tmp_path / "run"), "--class-conditional"]
    assert "have no labels; give each class a folder of its own" in refused("train_diffusion.py", *words)
    assert "a masked autoencoder does not use labels" in refused("train_mae.py", *words)
    assert not (tmp_path / "run").exists()


def test_components_that_do_not_fit_together_raise(pictures: Path, tmp_path: Path) -> None:
    def main(module, *words: object) -> str:
        words = ("--data", pictures, "--output-dir", tmp_path / "run", *words)
        recipe = ROOT / "configs" / "fashion_mnist_flow.yaml"
        with pytest.raises(UserError) as refusal:
            module.main(parse([*map(str, words)], adapter="flow", model="unet", recipe=recipe, output_dir="", help=""))
        return str(refusal.value)

    assert "--adapter mae can't train --model unet" in main(train_diffusion, "--adapter", "mae")
    assert "no `encoder`" in main(train_mae, "--adapter", "mae")
    assert not (tmp_path / "run").exists()


def test_impossible_mae_settings_raise(pictures: Path, tmp_path: Path) -> None:
    words = common(pictures, tmp_path / "run")
    for change, message in (
        ("--model.patch 1", "norm_pix needs patches of two or more values"),
        ("--model.heads 5", "timm can't make"),
        ("--model.encoder vit_relpos_small_patch16_224", "plain VisionTransformer"),
    ):
        assert message in refused("train_mae.py", *words, *change.split())
    assert not (tmp_path / "run").exists()


def test_parameters_without_gradients_are_found() -> None:
    """Several processes would wait for their gradients: here those of a norm that only pooled features use."""
    from pretrain.models.mae import MAEConfig

    from pretrain.adapters.mae import MAE
    from pretrain.training.flops import profile_sample

    model = MAEConfig("vit_base_patch16_reg4_gap_256", 4, 16, 1, 2, 16, 1, 2).build((1, 12, 12), 0)
    visit = profile_sample(MAE(), model, (1, 12, 12), 0)
    assert visit.flops > 0 and visit.unused and {*visit.unused} <= {*model.encoder.fc_norm.parameters()}


OWN = '''
from dataclasses import dataclass
from pretrain.adapters import Losses
from pretrain.adapters.flow import Flow as Ours

@dataclass(frozen=True)
class Own(Ours):
    """Not quite right."""

    def __call__(self, model, batch, rng):
        loss = super().__call__(model, batch, rng).loss
        return {}
'''


@pytest.mark.parametrize(
    ("result", "message"),
    [("Losses(loss.mean())", "got a loss of shape ()"), ("loss", "got Tensor"), ("None", "got NoneType")],
)
def test_an_adapter_that_breaks_the_contract_raises(result: str, message: str, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN.format(result))
    assert message in refused(
        "train_diffusion.py", *common(pictures, tmp_path / "run"), "--adapter", tmp_path / "own.py"
    )


def test_a_bad_image_stops_the_run_or_is_skipped_and_counted(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "data")
    victim = sorted((tmp_path / "data").rglob("*.png"))[20]
    victim.write_bytes(victim.read_bytes()[:40])
    sentence = refused("train_diffusion.py", *common(tmp_path / "data", tmp_path / "run"))
    assert str(victim) in sentence and "--on-bad-image skip" in sentence
    words = [*common(tmp_path / "data", tmp_path / "run"), "--on-bad-image", "skip", "--overwrite", "--infobatch"]
    train("train_diffusion.py", *words)
    (bad,) = json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"]
    assert str(victim) in bad
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "1 of the images could not be read or had no finite loss; they were skipped." in card
    scores = final(tmp_path / "run", "infobatch")["score"]
    assert scores.isnan().sum() <= 1 and scores[~scores.isnan()].isfinite().all()
