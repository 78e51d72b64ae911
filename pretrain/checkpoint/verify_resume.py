"""Proof that a killed run goes on exactly, on a configuration of your own.

    pretrain verify-resume --config configs/x.yaml --steps 8 --kill 3 5 [any other settings]

The run is trained twice, by the program that trains it: once left alone, once killed (SIGKILL) after each of the steps
and resumed. Then what both have saved at the last step is compared, byte by byte. On a CPU it should be the same; on an
accelerator as far as its kernels are deterministic.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain import HOME
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Damaged, verify
from pretrain.core.console import Display
from pretrain.core.errors import UserError

APART = {"seconds", "config"}  # the wall clock; the config names the folder


def start(program: Path, processes: int, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The program in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    python = [sys.executable, *(launcher if processes > 1 else [])]
    with log.open("ab") as file:
        return subprocess.Popen([*python, str(program), *arguments], stdout=file, stderr=file, start_new_session=True)


def reach(process: subprocess.Popen[bytes], folder: Path, step: int, log: Path, seconds: float = 600) -> None:
    """Wait until a step's checkpoint is there, then kill the program, its workers and its launcher.

    Raises:
        UserError: it ends before, or takes too long.
    """
    goal, end = folder / "checkpoints" / f"{storage.PREFIX}{step:08d}", time.monotonic() + seconds
    try:
        while not goal.is_dir():
            if process.poll() is not None and not goal.is_dir():
                said = " ".join(log.read_text(errors="replace").splitlines()[-1:])
                raise UserError(f"the run ended (status {process.returncode}) before step {step}; it said: {said}")
            if time.monotonic() > end:
                raise UserError(f"the run did not come to step {step} in {seconds:.0f} s; its output is in {log}")
            time.sleep(0.01)
    finally:
        for pid in _family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _family(pid: int) -> list[int]:
    """A process and all below it; a launcher's ranks have sessions of their own."""
    import psutil

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def differences(one: Path, other: Path) -> list[str]:
    """What two checkpoints differ in: tensors by file and name, values by name.

    Raises:
        UserError: one of them is damaged.
    """
    try:
        for path in (one, other):
            verify(path)
    except Damaged as error:
        raise UserError(f"a checkpoint is damaged: {error}") from None
    found = []
    for name in sorted({path.name for path in (*one.iterdir(), *other.iterdir())} - {"manifest.json", "state.json"}):
        if not ((one / name).is_file() and (other / name).is_file()):
            found.append(f"{name} (in one of them alone)")
        elif (one / name).read_bytes() != (other / name).read_bytes():
            first, second = storage.load(one).tensors[name[:-12]], storage.load(other).tensors[name[:-12]]
            found += [
                f"{name}: {key}"
                for key in sorted(first.keys() | second.keys())
                if key not in first
                or key not in second
                or first[key].numpy().tobytes() != second[key].numpy().tobytes()
            ] or [f"{name}: its header"]
    first, second = (json.loads((path / "state.json").read_text()) for path in (one, other))
    return found + [f"state.json: {key}" for key in sorted(first.keys() | second.keys()) if _unlike(key, first, second)]


def _unlike(key: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    if key == "metrics":  # a length; the seconds in it are longer or shorter
        return False
    return key not in APART and one.get(key) != other.get(key)


def prove(
    program: Path, processes: int, steps: int, kills: Sequence[int], arguments: Sequence[str], work: Path
) -> list[str]:
    """Train twice, killed and not, and compare.

    Args:
        program: one of train_*.py.
        processes: of each run.
        steps: that are compared after.
        kills: steps after whose checkpoint the run is killed, each resumed.
        arguments: settings.
        work: empty folder for the runs.

    Returns:
        What differs; nothing, if resuming is exact.
    """
    common = [*arguments, "--checkpoint.every=1", "--checkpoint.keep=1000000", "--overwrite"]
    left, killed, log = work / "left-alone", work / "killed", work / "output.txt"
    reach(start(program, processes, [*common, "--output-dir", str(left)], log), left, steps, log)
    words = [*common, "--output-dir", str(killed)]
    for step in (*kills, steps):
        reach(start(program, processes, words, log), killed, step, log)
        words = ["--resume", "--output-dir", str(killed)]
    name = f"{storage.PREFIX}{steps:08d}"
    return differences(left / "checkpoints" / name, killed / "checkpoints" / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser("pretrain verify-resume", description="Proof that a killed run goes on exactly.")
    parser.add_argument("--program", type=Path, default=HOME / "train_diffusion.py", help="or train_mae.py")
    parser.add_argument("--processes", type=int, default=1, help="of each run, started by torchrun")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps to compare after")
    parser.add_argument("--kill", type=int, nargs="*", help="steps after which to kill; where not given, three of them")
    parser.epilog = "Any other setting is the program's: --config FILE, --data.limit 200, ..."
    given, settings = parser.parse_known_args(arguments)
    steps = given.steps
    kills = sorted({1, steps // 2, steps - 1} - {0, steps}) if given.kill is None else sorted(given.kill)
    if steps < 2 or not all(0 <= kill < steps for kill in kills):
        raise UserError(f"--steps must be at least 2 and --kill below it, got {steps} and {kills}")
    display = Display(True)
    display.print(
        f"{given.program.name}, {given.processes} process(es): {steps} steps left alone; killed after {kills}"
    )
    work = Path(tempfile.mkdtemp(prefix="verify-resume-"))
    found = prove(given.program.resolve(), given.processes, steps, kills, settings, work)
    if found:
        display.print(
            f"NOT EXACT: {len(found)} tensors or values differ, the first: {found[0]}; both runs are in {work}"
        )
        raise SystemExit(1)
    shutil.rmtree(work)
    display.print(f"exact: after step {steps}, {len(kills)} kills and {len(kills)} resumes every byte is the same")


def run() -> None:
    """The command."""
    main(sys.argv[1:])
