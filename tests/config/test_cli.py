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


def test_a_home_that_is_not_there_is_a_name() -> None:
    for setting in ("--output-dir", "--data", "--data.subset", "--resume", "--evaluate.features"):
        config(setting, "~no-such-user/x")
    with pytest.raises(UserError, match="there is no such file"):
        config("--adapter", "~no-such-user/x.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--optim.lrr 3", "there is no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ("--no-data.flip", "there is no setting 'no-data.flip'; did you mean 'data.no_flip'?"),
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
        ("epochs: true\n", "--epochs must be a whole number, got 'true'"),
        ("epochs: 1:30\n", "--epochs must be a whole number, got '1:30'"),
        ("epochs: {}\n", "epochs must have a value, got {}; leave it out"),
        ("data: {source: }\n", "data.source must have a value, got null; leave it out"),
        ("infobatch: !!bool maybe\n", "infobatch must be true or false, got 'maybe'"),
        ("data: !!binary aGVsbG8=\n", "not plain YAML"),
        ("data: {size: 8}\ndata.size: 9\n", "data.size is given twice"),
        ("adapter: flow\nadapter.name: ddpm\n", "adapter.name is given twice"),
        ('output_dir: "a\\0b"\n', "has a null character"),
        ('model: "\\ud800.py"\n', "not plain YAML"),
        ("optim: {lr: .inf}\n", "optim.lr must be a finite number, got inf"),
        ("evaluate: {guidance: 1e400}\n", "evaluate.guidance must be a finite number, got inf"),
        ("optim: {betas: [-x, 1]}\n", "got the item '-x'"),
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


WORDS = (
    "no",
    "on",
    "010",
    "1:30",
    "1.10",
    "1_000",
    "2024-01-01",
    "0x10",
    "=",
    "1e3",
    "~/x",
    "true",
    "'null'",
    "größer",
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_name_in_a_file_is_its_text(encoding: str, tmp_path: Path) -> None:
    """Not what YAML 1.1 takes it for, whatever the encoding."""
    names = ("source", "train_split", "test_split", "image", "label")
    for start in range(0, len(WORDS), len(names)):
        given = dict(zip(names, WORDS[start:], strict=False))
        text = "data:\n" + "".join(f"  {name}: {word}\n" for name, word in given.items()) + "optim:\n  # lr: 1\n"
        (tmp_path / "r.yaml").write_bytes(text.encode(encoding))
        found = config("--config", str(tmp_path / "r.yaml"))
        assert {name: getattr(found.data, name) for name in given} == {n: w.strip("'") for n, w in given.items()}
    (tmp_path / "r.yaml").write_text("epochs: 010\nprecision: no\ninfobatch: On\ndata: {range: [-1, 1.5]}\n")
    found = config("--config", str(tmp_path / "r.yaml"))
    assert (found.epochs, found.precision, found.infobatch, found.data.range) == (10, "no", True, (-1, 1.5))


def test_a_nearby_file_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 1\n")
    with pytest.raises(UserError, match=r"did you mean recipe\.yaml"):
        config("--config", str(tmp_path / "recip.yaml"))


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("COLUMNS=1 PYTHON train_diffusion.py --help > /dev/full", 0, ""),
        ("(sleep 1; PYTHON -m pretrain --help; echo $? >&2) | true", 0, "0"),
        ("PYTHON train_mae.py --epochs x >&-", 2, "error: --epochs must be a whole number, got 'x'"),
        ("PYTHON train_mae.py --epochs x 2>&-", 2, ""),
        ("PYTHON -OO train_mae.py --help", 2, "error: python -OO (PYTHONOPTIMIZE=2) removes docstrings, which"),
    ],
)
def test_output_that_is_closed_or_full_and_an_odd_interpreter(command: str, status: int, message: str) -> None:
    """With a terminal of any width; nothing but the message on stderr."""
    words = command.replace("PYTHON", sys.executable)
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == status and done.stderr.startswith(message), done.stderr
    assert done.stderr.count("\n") == bool(message)


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
