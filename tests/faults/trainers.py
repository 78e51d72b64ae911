"""Real trainers for faults. Each is forked from a server that has imported everything, so that it starts at once."""

import io
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import MappingProxyType

import diffusers.schedulers.scheduling_dpmsolver_multistep
import matplotlib.pyplot
import psutil
from pretrain.models import mae, unet

import train_diffusion
import train_mae
from pretrain.config.cli import parse
from pretrain.core.errors import exit_on_user_error
from pretrain.data import image_cache, loader, sources
from pretrain.distributed import heartbeat
from pretrain.evaluation import previews
from pretrain.export import export
from pretrain.training import loop, state
from tests.conftest import tiny

PROGRAMS = {"train_diffusion.py": train_diffusion, "train_mae.py": train_mae}
IMPORTED = (
    export,
    loop,
    previews,
    sources,
    state,
    mae,
    unet,
    matplotlib.pyplot,
    diffusers.schedulers,
)
HANGS = 300.0  # seconds after which a process that should have ended counts as hung; no test depends on less
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def impatient() -> None:
    """Short timeouts for other processes and for loader workers."""
    heartbeat.INTERVAL, heartbeat.TIMEOUT = 0.5, 6.0
    loader.BATCH_TIMEOUT = 20.0


def keeping_nothing(first: Callable[[], None] | None = None) -> None:
    """Images are not cached, as those of a large data set: workers read them, if there are any."""
    image_cache.MAX_HOST_BYTES = 0
    if first is not None:
        first()


def _trainer(
    script: str, words: Sequence[str], log: Path, environment: dict[str, str], first: Callable[[], None] | None
) -> None:
    os.setpgid(0, 0)
    terminal = os.dup(2)
    file = log.open("a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    sys.argv = [script]
    os.environ.update(environment)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also if the tests run under nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers: a program's own
    if first is not None:
        first()
    try:
        with exit_on_user_error():
            program = PROGRAMS[script]
            program.main(parse(words, **program.START, output_dir="runs/x", help=""))
    except SystemExit:
        raise
    except KeyboardInterrupt:  # before the program has started, or after its end
        sys.exit(130)
    except BaseException:  # printed here, in case the disk of the log is full
        os.write(terminal, traceback.format_exc().encode())
        with suppress(OSError):
            traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout = sys.stderr = io.StringIO()
        with suppress(OSError):
            file.close()


class Trainers:
    """One launch of a program, tiny. As a context manager it kills all of its processes at the end.

    Args:
        script: the program.
        words: its settings.
        log: file that all of them append their output to.
        processes: how many.
        each: further settings of each process, by rank.
        environment: variables of all of them.
        first: called in each process before the program; a module's function.
    """

    def __init__(
        self,
        script: str,
        words: Sequence[object],
        log: Path,
        *,
        processes: int = 1,
        each: Sequence[Sequence[object]] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
        first: Callable[[], None] | None = None,
    ) -> None:
        self.log, message = log, tiny(script, *words)
        self._before = log.stat().st_size if log.exists() else 0
        variables = {**environment}
        port, self.processes = free_port(), []
        for rank in range(processes):
            if processes > 1:
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            own = [*message, *map(str, each[rank])] if each else message
            process = CONTEXT.Process(target=_trainer, args=(script, own, log, {**variables}, first))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> "Trainers":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """All of them."""
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def have_met(self) -> bool:
        """Whether the process group is initialized, so that they monitor each other."""
        return b" on cpu" in self.log.read_bytes()[self._before :]

    @property
    def over(self) -> bool:
        return not any(process.is_alive() for process in self.processes)

    def send(self, number: int, rank: int) -> None:
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def workers(self, rank: int = 0) -> list[psutil.Process]:
        """Of its loader."""
        try:
            return psutil.Process(self.processes[rank].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait(self, seconds: float = HANGS) -> list[int | None]:
        """Wait for all to end; returns their exit statuses, None for those that still run."""
        end = time.monotonic() + seconds
        running = [process.sentinel for process in self.processes]
        while running and (left := end - time.monotonic()) > 0:
            ended = wait(running, left)
            running = [each for each in running if each not in ended]
        for process in self.processes:
            process.join(0)
        return [process.exitcode for process in self.processes]

    def until(self, condition: Callable[[], object], seconds: float = HANGS) -> None:
        """Wait until a condition holds.

        Raises:
            AssertionError: the trainers ended before it did, or it takes too long.
        """
        end = time.monotonic() + seconds
        while not condition():
            assert not self.over and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
