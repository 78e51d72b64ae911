"""Code that a downloaded run or recipe names is not run."""

from pathlib import Path

import pytest
from programs import common, refused, train

from pretrain.checkpoint import storage
from pretrain.checkpoint.load_run import load_run
from pretrain.core.errors import UserError
from pretrain.export import export

HARM = """
from dataclasses import dataclass
from pathlib import Path
from pretrain.adapters.ddpm import DDPM
Path({proof!r}).touch()

@dataclass(frozen=True)
class Mine(DDPM):
    def __call__(self, model, batch, draws):
        return super().__call__(model, batch, draws)
"""


@pytest.fixture
def harmful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter.py").write_text(HARM.format(proof=str(tmp_path / "proof")))
    return tmp_path / "theirs" / "adapter.py"


def test_code_named_by_a_run_is_not_run(harmful: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "theirs" / "run"
    train("train_diffusion.py", *common(pictures, run, 1))
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("name: ddpm", f"name: {harmful}", 1))
    with pytest.raises(UserError, match=f"names {harmful}, whose code would be executed; read it"):
        load_run(run)
    assert "PRETRAIN_TRUST=" in refused("train_diffusion.py", "--resume", "--output-dir", run)
    assert not (tmp_path / "proof").exists() and not (tmp_path / "home" / "infobatch-pretrain").exists()
    monkeypatch.setenv("PRETRAIN_TRUST", str(harmful))
    load_run(run)
    assert (tmp_path / "proof").exists()


def test_a_copied_run_writes_to_its_own_folder(pictures: Path, tmp_path: Path) -> None:
    """Whatever folder its settings name."""
    run = tmp_path / "run"
    train("train_diffusion.py", *common(pictures, run, 1))
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace(str(run), str(tmp_path / "important")))
    export.main(run)
    train("train_diffusion.py", "--resume", "--output-dir", run, "--epochs", 2)
    train("train_diffusion.py", "--resume", storage.newest(run / "checkpoints"), "--epochs", 3)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    "setting",
    [
        "adapter: {name: NAME}",
        "model: {name: NAME}",
        "pruning: {policy: NAME}",
        "evaluate: {metrics: [NAME]}",
        "evaluate: {metrics: ['loss,NAME']}",
    ],
)
def test_code_named_by_a_recipe_is_not_run(setting: str, harmful: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "theirs" / "recipe.yaml"
    recipe.write_text(setting.replace("NAME", str(harmful)))
    message = refused("train_diffusion.py", "--config", recipe, *common(pictures, tmp_path / "run"))
    assert message.startswith(f"{recipe} names {harmful}, whose code")
    assert not (tmp_path / "proof").exists() and not (tmp_path / "run").exists()


def test_code_named_on_the_command_line_is_trusted_later(
    harmful: Path, pictures: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Also from another folder. A moved file is accepted, a change of its code reported, one of its fields refused."""
    monkeypatch.chdir(harmful.parent)
    train("train_diffusion.py", *common(pictures, tmp_path / "run", 1), "--adapter", harmful.name)
    monkeypatch.chdir(tmp_path)
    train("train_diffusion.py", "--resume", "--output-dir", tmp_path / "run", "--epochs", 2)
    assert "the code of" not in capsys.readouterr().out
    load_run(tmp_path / "run")
    assert (tmp_path / "home" / "infobatch-pretrain" / "named.txt").read_text().endswith(f"  {harmful}\n")
    moved, text = tmp_path / "adapter.py", harmful.read_text()
    moved.write_text(text + "\n# changed\n")
    again = ["--resume", "--output-dir", tmp_path / "run", "--adapter", moved, "--epochs"]
    train("train_diffusion.py", *again, 3)
    assert f"the code of {moved}" in capsys.readouterr().out
    moved.write_text(text.replace("class Mine(DDPM):", "class Mine(DDPM):\n    more: float = 0.5\n"))
    assert f"{moved} had other fields when the checkpoint was written (more)" in refused(
        "train_diffusion.py", *again, 4
    )
