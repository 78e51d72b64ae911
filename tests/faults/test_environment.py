"""A run does not depend on where and when it is started."""

import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
from conftest import PRUNED, ROOT, read_metrics, tiny
from programs import common, same, train


def test_another_folder_hash_seed_locale_and_time_zone(pictures: Path, finished: Path, tmp_path: Path) -> None:
    words = tiny("train_diffusion.py", *common(pictures, Path("run")), *PRUNED)
    here = tmp_path / "größer, 大 и больше"
    here.mkdir()
    around = {"PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "Pacific/Chatham", "HOME": str(here), "TERM": "dumb"}
    around["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # its list of fonts takes long to make
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_diffusion.py"), *words, "--micro-batch", "6"],
        cwd=here,
        env={**os.environ, **around},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert same(finished, here / "run") and read_metrics(finished) == read_metrics(here / "run")


def test_a_clock_that_jumps(pictures: Path, finished: Path, tmp_path: Path, monkeypatch) -> None:
    """Back by a year at every call."""
    now = [time.time()]

    def jumping() -> float:
        now[0] -= 3.15e7
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    train("train_diffusion.py", *common(pictures, tmp_path / "run"), *PRUNED, "--micro-batch", 6)
    assert same(finished, tmp_path / "run") and read_metrics(finished) == read_metrics(tmp_path / "run")
