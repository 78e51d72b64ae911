"""benchmarks/gpu: tasks stop in time, archives are read back, nothing is installed twice."""

import importlib.machinery
import importlib.util
import json
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import ROOT

KIT = ROOT / "benchmarks" / "gpu"


def script(name: str):
    """A script without an extension, as a module."""
    loader = importlib.machinery.SourceFileLoader(f"gpu_{name}", str(KIT / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


run, report = script("run"), script("report")
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended (it is a zombie until its parent waits for it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_task_that_ignores_signals_is_killed_in_time_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRACE", 17.0)
    monkeypatch.setattr(run, "KILL", 15.0)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    deadline = time.monotonic() + 20
    command = [sys.executable, "-c", STUBBORN, str(tmp_path / "pids")]
    status = run.supervised(command, tmp_path / "log.txt", deadline, dict(os.environ))
    assert status == run.STOPPED and time.monotonic() < deadline
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        while not gone(pid) and time.monotonic() < deadline + 30:
            time.sleep(0.05)
        assert gone(pid)


def test_a_task_that_ends_gives_its_own_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    command = [sys.executable, "-c", "print('here'); raise SystemExit(3)"]
    assert run.supervised(command, tmp_path / "log.txt", time.monotonic() + 60, dict(os.environ)) == 3
    assert (tmp_path / "log.txt").read_text() == "here\n"


def test_records_are_archived_and_weights_are_not(tmp_path: Path) -> None:
    work = tmp_path / "runs" / "gpu" / "diffusion"
    for seed in (0, 1):
        record = {"arm": "full", "family": "full", "seed": seed, "quality": {"validation_loss": 0.5 + seed}}
        record |= {"cost": {"samples_used": 10, "flops": 1e9, "seconds": 1.0}}
        record |= {"flags": [], "command": f"python train_diffusion.py --seed {seed} --output-dir runs/full-seed{seed}"}
        path = work / "bench" / "records" / f"full-seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    checkpoint = work / "bench" / "runs" / "full-seed0" / "checkpoints" / "step-1" / "values.json"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("{}")
    (work / "weights.safetensors").write_bytes(b"0" * 100)
    run.archive(work, tmp_path / "out" / "diffusion.tar.gz")
    with tarfile.open(tmp_path / "out" / "diffusion.tar.gz") as tar:
        names = tar.getnames()
    assert sorted(names) == [f"diffusion/bench/records/full-seed{seed}.json" for seed in (0, 1)]
    report.main((tmp_path / "out" / "diffusion.tar.gz",), tmp_path / "results")
    assert len([*(tmp_path / "results" / "bench" / "records").glob("*.json")]) == 2
    assert "1.0000 ± 0.7071" in (tmp_path / "results" / "bench" / "table.md").read_text()


def test_the_comparison_with_other_programs_is_archived_without_its_images_and_copied(tmp_path: Path) -> None:
    work = tmp_path / "runs" / "gpu" / "peers"
    for name in ("records/dit-bare-loop-0.json", "table.md", "data/images/train/0/0.png", "data/vit/config.json"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("{}")
    run.archive(work, tmp_path / "out" / "peers.tar.gz")
    with tarfile.open(tmp_path / "out" / "peers.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["peers/records/dit-bare-loop-0.json", "peers/table.md"]
    report.main((tmp_path / "out" / "peers.tar.gz",), tmp_path / "results")
    found = sorted(path.relative_to(tmp_path / "results").as_posix() for path in (tmp_path / "results").rglob("*.*"))
    assert found == ["gpu/peers/dit-bare-loop-0.json", "gpu/peers/table.md"]


def test_only_what_is_missing_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    for name in ("torch-9.0-py3-none-any.whl", "surely_missing-1.0-py3-none-any.whl"):
        (tmp_path / "wheels" / name).touch()
    calls: list[list[str]] = []
    monkeypatch.setattr(run.subprocess, "run", lambda command, check: calls.append(command))
    (tmp_path / "site").mkdir()
    run.install(tmp_path / "wheels", tmp_path / "site")
    run.install(tmp_path / "wheels", tmp_path / "site")
    ((*_, last),) = calls
    assert last.endswith("surely_missing-1.0-py3-none-any.whl")
    assert not any("torch-9.0" in word for word in calls[0]) and str(tmp_path / "site") in calls[0]
