"""A run does not depend on where and when it is started."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import matplotlib
from conftest import PRUNED, ROOT, read_metrics, tiny
from programs import common, same, train


def on_a_terminal(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status, and what the terminal was sent."""
    master, slave = os.openpty()
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=folder, env={**os.environ, **environment})
    os.close(slave)
    shown = b""
    with suppress(OSError):  # the program has ended
        while True:
            shown += os.read(master, 4096)
    os.close(master)
    return process.wait(), shown.decode()


def test_on_a_terminal_in_another_folder_with_another_hash_seed_locale_and_time_zone(
    pictures: Path, finished: Path, tmp_path: Path
) -> None:
    """It shows a live line, and the run is the same."""
    words = tiny("train_diffusion.py", *common(pictures, Path("run")), *PRUNED)
    here = tmp_path / "größer, 大 и больше"
    here.mkdir()
    around = {"PYTHONHASHSEED": "77", "LC_ALL": "C", "TZ": "Pacific/Chatham", "HOME": str(here)}
    around |= {"TERM": "xterm", "COLUMNS": "140"}
    around["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # its list of fonts takes long to make
    command = [sys.executable, str(ROOT / "train_diffusion.py"), *words, "--micro-batch", "6"]
    status, shown = on_a_terminal(command, here, around)
    assert status == 0, shown
    for message in ("images/s", "skipped", "loss", " left", "━", "epoch 4/4  loss"):
        assert message in shown
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
