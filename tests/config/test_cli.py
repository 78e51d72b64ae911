"""The command line: --help, and every mistake is one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

from pretrain.__main__ import main as pretrain_command
from pretrain.config.cli import parse
from pretrain.config.schema import Config, Data
from pretrain.config.tyro_parser import run_command
from pretrain.core.errors import UserError

RECIPE = ROOT / "configs" / "fashion_mnist_flow.yaml"


def config(*arguments: str, recipe: Path = RECIPE) -> Config:
    return parse(arguments, adapter="flow", model="unet", recipe=recipe, output_dir="runs/x", help="Help.")


def test_errors_are_one_line_for_any_input() -> None:
    with pytest.raises(UserError) as refusal:
        config("--adapter", "a\nb\x1b[31m\udc80")
    assert str(refusal.value).startswith(r"--adapter a\nb\x1b[31m\udc80: There are")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optim.lrr 3", "there is no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ("--lr 3", "there is no setting 'lr'; did you mean 'optim.lr'?"),
        ("--optim.lr fast", "--optim.lr must be a number, got 'fast'"),
        ("--data.size big", "--data.size must be a whole number, got 'big'"),
        ("--epochs 1.5", "--epochs must be a whole number, got '1.5'"),
        ("--data=", "data must be images, got an empty name"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--pruning.prune-ratio 1", "pruning.prune_ratio must be in [0, 1), got 1"),
        ("--adapter flwo", "did you mean flow? There are ddpm, edm, flow, mae"),
        ("--adapter nowhere.py", "there is no such file"),
        ("--adapter.label-dropout 2", "label_dropout must be in [0, 1], got 2"),
        ("--precision half", "'half' for argument '--precision'. Expected one of ('no', 'fp16', 'bf16')"),
        ("--config nope.yaml", "there is no such file"),
        ("--resume --overwrite", "exclude each other"),
        ("stray", "unexpected argument 'stray'"),
        ("--seed -1", "seed must be 0 or more, got -1"),
        ("--batch-size", "--batch-size"),
        ("--config", "--config needs the path"),
        ("--model.head-dim 0", "head_dim must be at least 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        config(*arguments.split())
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", "there is no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ("optim:\n  lr: fast\n", "--optim.lr must be a number, got 'fast'"),
        ("optim: 3\n", "there is no setting 'optim'"),
        ("infobatch: maybe\n", "infobatch must be true or false, got 'maybe'"),
        ("epochs: [1, 2]\n", "epochs must be one value"),
        ("epochs: true\n", "--epochs must be a whole number, got 'True'"),
        ("pruning: {prune_ratio: 1.5}\n", "pruning.prune_ratio must be in [0, 1), got 1.5"),
        ("adapter: {name: nope}\n", "There are ddpm, edm, flow, mae"),
        ("a: !!python/object/apply:os.system ['touch x']\n", "not plain YAML"),
        ("just words\n", "a recipe has settings"),
        ("a: [\n", "not plain YAML"),
        ("resume: x\n", "resume is taken from the command line only"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as refusal:
        config("--config", str(recipe))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    assert str(recipe) in str(refusal.value) or "nope" in text


def test_a_nearby_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 1\n")
    with pytest.raises(UserError, match=r"did you mean recipe\.yaml"):
        config("--config", str(tmp_path / "recip.yaml"))


@pytest.mark.parametrize("script", ["train_diffusion.py", "train_mae.py"])
def test_help_does_not_import_torch(script: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['{script}', '--help']\ntry: runpy.run_path('{script}', run_name='__main__')\n"
    )
    code += "except SystemExit: pass\nprint('TORCH' if 'torch' in sys.modules else 'LIGHT')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.stdout.endswith("LIGHT\n"), done.stdout + done.stderr
    for flag in [
        "--data",
        "--output-dir",
        "--epochs",
        "--batch-size",
        "--seed",
        "--resume",
        "--overwrite",
        "--adapter",
        "--infobatch",
    ]:
        assert f"{flag} " in done.stdout or f"{flag}," in done.stdout
    for flag in ("--config", "--pruning.policy", "--pruning.prune-ratio", "--tracker", "--on-bad-image"):
        assert flag in done.stdout


@pytest.mark.parametrize("name", ["export", "generate", "coreset", "encode-latents", "ema"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--nn", "3"], "Unrecognized options: --nn"),
        (["run", "extra", "--nn"], "Unrecognized options: "),
        ([], " is needed: "),
    ],
)
def test_a_mistake_in_a_commands_line_is_one_sentence(name: str, words: list[str], message: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", name, *words])
    with pytest.raises(SystemExit) as exit:
        pretrain_command()
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and (message in err or "is needed" in err)


def test_a_command_gets_its_options(monkeypatch) -> None:
    found = []

    def main(run: tyro.conf.Positional[Path], *, n: int = 3, data: Data = Data()) -> None:  # noqa: B008
        """Do it.

        Args:
            run: where.
            n: how often.
            data: with what.
        """
        found.append((run, n, data.size))

    monkeypatch.setattr(sys, "argv", ["x", "here", "--data.size", "8"])
    run_command(main, "x")
    assert found == [(Path("here"), 3, 8)]
