"""The examples run as they are written, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))  # as for a script that is started there

import hf_trainer
import lightning_module
import plain_loop
import toy

# What these libraries say of themselves and of the machine; ours must not warn.
quiet = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch.utils.data", "ignore:::transformers")


def run(*words: object, processes: int = 0) -> str:
    """The last line of a script's output."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = (sys.executable, *launch, *words)
    done = subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def promises(line: str) -> int:
    """Visits of a run; it learns, and it prunes."""
    found = re.fullmatch(r"([\d,]+) visits instead of ([\d,]+), accuracy (.*)", line)
    assert found, line
    visited, full = (int(number.replace(",", "")) for number in found.groups()[:2])
    assert 0.55 * full < visited < 0.8 * full and float(found[3]) > 0.95
    return visited


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return plain_loop.main().state_dict()


def same(model: torch.nn.Module, parameters: dict[str, Any]) -> bool:
    return all(torch.equal(value, parameters[name]) for name, value in model.state_dict().items())


def test_plain_loop_is_stopped_and_goes_on(plain: dict[str, Any], tmp_path: Path, capsys) -> None:
    promises(run("examples/plain_loop.py"))
    for stop_after in (1, 70, 133, 151):
        file = tmp_path / f"{stop_after}.pt"
        plain_loop.main(checkpoint=file, stop_after=stop_after)
        assert re.search(r"stopped in epoch \d+ after \d+ of its", capsys.readouterr().out)
        assert same(plain_loop.main(checkpoint=file), plain)


def test_ddp_is_one_run_on_any_number_of_processes(tmp_path: Path) -> None:
    lines = [run("examples/ddp.py", "--save", tmp_path / str(n), processes=n) for n in (1, 2, 3)]
    one, two, three = (torch.load(tmp_path / str(n), weights_only=True) for n in (1, 2, 3))
    promises(lines[0])
    assert lines[0] == lines[1] == lines[2]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(three[name], value, rtol=1e-4, atol=1e-4)


@quiet
def test_hf_trainer_is_the_plain_loop(plain: dict[str, Any]) -> None:
    assert same(hf_trainer.main().model, plain)
    promises(run("examples/hf_trainer.py"))


@quiet
def test_lightning_is_the_plain_loop_also_after_a_resume(plain: dict[str, Any], tmp_path: Path) -> None:
    promises(run("examples/lightning_module.py"))
    module = lightning_module.main()
    assert same(module.model, plain) and module.infobatch.epoch == 20

    class Stop(lightning_module.lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 7

    more = {"enable_checkpointing": True, "default_root_dir": tmp_path, "callbacks": [Stop()]}
    assert lightning_module.main(**more).infobatch.epoch == 8
    (file,) = tmp_path.rglob("*.ckpt")
    resumed = lightning_module.main(ckpt_path=str(file))
    assert same(resumed.model, plain) and resumed.infobatch.visited == module.infobatch.visited


def test_the_toy_has_easy_and_hard_samples() -> None:
    model = plain_loop.main(epochs=3)
    losses = torch.nn.functional.cross_entropy(model(toy.data()[:][0]), toy.data()[:][1], reduction="none")
    assert losses.median() < 0.5 * losses.mean()
