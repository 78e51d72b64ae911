"""benchmarks/compare.py: whole comparisons, killed and resumed, on several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare
import pytest
from conftest import ROOT

from pretrain.core.errors import exit_on_user_error

SMALL = ["--epochs", "4", "--data.limit", "96", "--data.held-out", "64", "--batch-size", "16", "--model.channels", "8"]


def command(folder: Path, *more: str) -> list[str]:
    recipe = ROOT / "benchmarks" / "recipes" / "epsilon.yaml"
    program = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), "--config", str(recipe)]
    return [*program, "--output-dir", str(folder), "--images", "64", "--steps", "2", *SMALL, *more]


@pytest.mark.slow
def test_a_killed_comparison_is_resumed_and_a_policy_equal_to_random_has_its_results(tmp_path: Path, capsys) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import torch\nfrom pretrain.infobatch.policies import SamplingRule\n\n\n"
        "def clever(score, stats, *, share):\n"
        "    return SamplingRule(torch.empty(0), torch.full((1,), share, dtype=torch.float64), share)\n"
    )
    arms = ["--arms", "random", f"clever=--pruning.policy {planted} --pruning.budget 0.65", "full"]
    killed = command(tmp_path / "out", *arms, "--seeds", "0", "1", "--compensations", "0")
    first = subprocess.Popen(killed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    records = tmp_path / "out" / "records"
    for _ in range(1200):
        if records.is_dir() and len(list(records.glob("*.json"))) == 1:
            break
        assert first.poll() is None, first.stdout.read() if first.stdout else ""
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    (done,) = records.glob("*.json")
    before = done.stat().st_mtime_ns
    compare.main(killed[2:])
    assert done.stat().st_mtime_ns == before
    found = {path.stem: json.loads(path.read_text()) for path in records.glob("*.json")}
    assert len(found) == 6
    for seed in (0, 1):
        random, clever = found[f"random@0.65-seed{seed}"], found[f"clever-seed{seed}"]
        assert clever["quality"] == random["quality"]
        assert clever["cost"]["samples_used"] == random["cost"]["samples_used"]
        assert random["cost"]["samples_used"] == round(0.65 * 96 * 4) and "frechet_distance" in random["quality"]
    assert found["random@0.65-seed0"]["quality"] != found["random@0.65-seed1"]["quality"]
    assert "| clever |" in capsys.readouterr().out and (tmp_path / "out" / "figure.png").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "ful"], "there are full, shortened"),
        (["--arms", "mine=--pruning.policy nothing"], "did you mean"),
        (["--arms", "full", "--epochs", "0"], "at least 1"),
        (["--features", "missing.safetensors", "--arms", "full"], "missing.safetensors"),
    ],
)
def test_a_wrong_comparison_raises_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", command(tmp_path / "out", *more)[1:])
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        compare.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("runs/*"))


@pytest.mark.slow
def test_a_comparison_by_several_processes_is_that_of_one(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arms = ["--arms", "full", "random", "--seeds", "0", "--compensations", "0"]
    compare.main(command(tmp_path / "one", *arms)[2:])
    run = subprocess.run([*torchrun, *command(tmp_path / "two", *arms)[1:]], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in ("full-seed0", "random@0.65-seed0"):
        one, two = (json.loads((tmp_path / f / "records" / f"{name}.json").read_text()) for f in ("one", "two"))
        assert two["processes"] == 2 and one["cost"]["samples_used"] == two["cost"]["samples_used"]
        assert two["quality"]["validation_loss"] == pytest.approx(one["quality"]["validation_loss"], rel=1e-4)
