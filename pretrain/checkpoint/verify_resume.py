"""Test that a killed and resumed run is identical to an uninterrupted one, on your own configuration.

    pretrain verify-resume --config configs/x.yaml --steps 8 --kill 3 5 [other settings of the program]

The run is trained twice: once without interruption, and once killed (SIGKILL) after each of the given steps and
resumed. Then the checkpoints of both at the last step are compared byte by byte. They should be identical on a CPU, and
on an accelerator if its kernels are deterministic.
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

from safetensors.torch import load_file

from pretrain import HOME
from pretrain.checkpoint import storage
from pretrain.checkpoint.manifest import Damaged, verify
from pretrain.core.console import Display
from pretrain.core.errors import UserError

NOT_COMPARED = {"seconds", "config"}  # values of state.json: wall-clock time; the config has the output folder


def start(program: Path, processes: int, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the program in a session of its own; its output is appended to `log`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    python = [sys.executable, *(launcher if processes > 1 else [])]
    with log.open("ab") as file:
        return subprocess.Popen([*python, str(program), *arguments], stdout=file, stderr=file, start_new_session=True)


def kill_at_step(process: subprocess.Popen[bytes], folder: Path, step: int, log: Path, timeout: float = 600) -> None:
    """Wait for the checkpoint of a step, then kill the program, its workers and its launcher.

    Args:
        process: the program.
        folder: of its run.
        step: optimizer steps made.
        log: file with the program's output.
        timeout: in seconds.

    Raises:
        UserError: the program ended before, or the step was not reached in time.
    """
    goal, end = folder / "checkpoints" / f"{storage.PREFIX}{step:08d}", time.monotonic() + timeout
    try:
        while not goal.is_dir():
            if process.poll() is not None and not goal.is_dir():
                last_line = " ".join(log.read_text(errors="replace").splitlines()[-1:])
                raise UserError(
                    f"the run ended (status {process.returncode}) before step {step}; its last output: {last_line}"
                )
            if time.monotonic() > end:
                raise UserError(f"the run did not reach step {step} in {timeout:.0f} s; its output is in {log}")
            time.sleep(0.01)
    finally:
        for pid in _with_children(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _with_children(pid: int) -> list[int]:
    """A process and all its descendants; a launcher's ranks are in sessions of their own."""
    import psutil

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def differences(one: Path, other: Path) -> list[str]:
    """The differences of two checkpoints, apart from `NOT_COMPARED`.

    Args:
        one, other: folders of the checkpoints.

    Returns:
        Names of tensors ("file: name") and values ("state.json: name") that differ; empty if there are none.

    Raises:
        UserError: a checkpoint is damaged.
    """
    try:
        for path in (one, other):
            verify(path)
    except Damaged as error:
        raise UserError(f"a checkpoint is damaged: {error}") from None
    found = []
    for name in sorted({path.name for path in (*one.iterdir(), *other.iterdir())} - {"manifest.json", "state.json"}):
        if not ((one / name).is_file() and (other / name).is_file()):
            found.append(f"{name} (only one checkpoint has it)")
        elif (one / name).read_bytes() != (other / name).read_bytes():
            first, second = load_file(one / name), load_file(other / name)
            found += [
                f"{name}: {key}"
                for key in sorted(first.keys() | second.keys())
                if key not in first
                or key not in second
                or first[key].numpy().tobytes() != second[key].numpy().tobytes()
            ] or [f"{name}: its header"]
    first, second = (json.loads((path / "state.json").read_text()) for path in (one, other))
    return found + [
        f"state.json: {key}" for key in sorted(first.keys() | second.keys()) if _differs(key, first, second)
    ]


def _differs(key: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    if key == "metrics":  # the length of metrics.jsonl, which has seconds with varying numbers of digits
        return False
    return key not in NOT_COMPARED and one.get(key) != other.get(key)


def compare_runs(
    program: Path, processes: int, steps: int, kills: Sequence[int], arguments: Sequence[str], work: Path
) -> list[str]:
    """Train with and without kills, and compare the checkpoints of the last step.

    Args:
        program: train_diffusion.py or train_mae.py.
        processes: of each run.
        steps: optimizer steps.
        kills: steps after whose checkpoint the second run is killed and resumed.
        arguments: settings of the program.
        work: empty folder for the runs.

    Returns:
        The `differences`; empty if resuming is exact.

    Raises:
        UserError: a run failed or did not reach a step.
    """
    common = [*arguments, "--checkpoint.every=1", "--checkpoint.keep=1000000", "--overwrite"]
    reference, killed, log = work / "uninterrupted", work / "killed", work / "output.txt"
    process = start(program, processes, [*common, "--output-dir", str(reference)], log)
    kill_at_step(process, reference, steps, log)
    settings = [*common, "--output-dir", str(killed)]
    for step in (*kills, steps):
        kill_at_step(start(program, processes, settings, log), killed, step, log)
        settings = ["--resume", "--output-dir", str(killed)]
    name = f"{storage.PREFIX}{steps:08d}"
    return differences(reference / "checkpoints" / name, killed / "checkpoints" / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; `arguments` are those of the command line, by default this process's.

    Raises:
        UserError: the arguments don't fit together, or a run failed.
        SystemExit: with status 1 if resuming is not exact.
    """
    parser = ArgumentParser(
        "pretrain verify-resume",
        description="Train a configuration twice, once without interruption and once killed (SIGKILL) and resumed, and "
        "check that the checkpoints of the last step are identical byte by byte.",
        epilog="All other settings are passed to the program: --config FILE, --data.limit 200, ...",
    )
    parser.add_argument(
        "--program", type=Path, default=HOME / "train_diffusion.py", help="train_diffusion.py (default) or train_mae.py"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes of each run, by torchrun (default: 1)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run (default: 8)")
    parser.add_argument(
        "--kill", type=int, nargs="*", help="steps after which the run is killed (default: 1, STEPS / 2, STEPS - 1)"
    )
    given, settings = parser.parse_known_args(arguments)
    steps = given.steps
    kills = sorted({1, steps // 2, steps - 1} - {0, steps}) if given.kill is None else sorted(given.kill)
    if steps < 2 or not all(0 <= kill < steps for kill in kills):
        raise UserError(f"--steps must be at least 2 and --kill below it, got {steps} and {kills}")
    display = Display(True)
    display.print(
        f"{given.program.name}, {given.processes} process(es): {steps} steps without interruption, then killed after "
        f"steps {', '.join(map(str, kills)) or 'none'} and resumed"
    )
    work = Path(tempfile.mkdtemp(prefix="verify-resume-"))
    found = compare_runs(given.program.resolve(), given.processes, steps, kills, settings, work)
    if found:
        display.print(
            f"NOT EXACT: {len(found)} tensors or values differ, the first one: {found[0]}; both runs are in {work}"
        )
        raise SystemExit(1)
    shutil.rmtree(work)
    display.print(f"exact: after step {steps}, with {len(kills)} kills and resumes, every byte is the same")


def run() -> None:
    """Run the command `pretrain verify-resume`."""
    main(sys.argv[1:])
