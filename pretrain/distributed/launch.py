"""The processes of one launch: how many there are, what they agree on, and when they are told to stop."""

import atexit
import ctypes
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
import yaml
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)

from pretrain.core.errors import UserError
from pretrain.distributed.agreement import require_same_settings
from pretrain.distributed.heartbeat import Heartbeat

GRACE = 30.0  # seconds in which a process's own signal is the one that it heard of from another process


def start(output_dir: Path, precision: str, tracker: str | None) -> Accelerator:
    """This process's accelerator.

    Args:
        output_dir: folder of the run.
        precision: "no", "fp16" or "bf16".
        tracker: experiment tracker that accelerate knows.

    Raises:
        UserError: the launcher started another number of processes than it was asked for, the batch can't be divided
            among them, the model is to be sharded, or precision or tracker are not to be had here.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        raise UserError(
            f"accelerate was told to compute in {launched}, this run in {precision}; say --precision {launched}"
        )
    for way in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true":
            raise UserError(
                f"accelerate was told to use {way}, which shards the model; here it has to fit each device: start it "
                "without, and save memory by --gradient-checkpointing and --micro-batch auto"
            )
    meeting: dict[str, Any] = _meeting()
    folder = ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "trackers"))
    try:
        accelerator = Accelerator(
            # Without it, torchrun on a CPU gives independent runs that all take themselves for rank 0.
            cpu="WORLD_SIZE" in os.environ and not torch.cuda.is_available(),
            mixed_precision=precision,
            # Stated, because accelerate would take it from its own config file, and divide losses by it.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=tracker,
            project_config=folder,
            kwargs_handlers=[InitProcessGroupKwargs(**meeting)] if meeting else None,
        )
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    _all_there(accelerator.num_processes)
    _end_with_the_launcher()
    if tracker and not accelerator.log_with:
        raise UserError(f"--tracker {tracker}: its package is not installed; pip install {tracker}")
    atexit.register(accelerator.state.destroy_process_group)
    return accelerator


def join() -> PartialState:
    """This process among those of its launch, for programs that do not train.

    Raises:
        UserError: the launcher started another number of processes than it was asked for, or differing commands.
    """
    state = PartialState(cpu="WORLD_SIZE" in os.environ and not torch.cuda.is_available(), **_meeting())
    _all_there(state.num_processes)
    atexit.register(state.destroy_process_group)
    require_same_settings({"the command": shlex.join(sys.argv[1:])})
    return state


def _meeting() -> dict[str, str]:
    """Arguments of `init_process_group` for processes that torchrun started again; none for others.

    They meet under keys of this attempt: torchrun's store still has those of the attempt before, and a process that
    reads them waits for one that is gone.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return {}

    def meet(url: str, **settings: Any) -> Iterator[tuple[torch.distributed.Store, int, int]]:
        for store, rank, world in torch.distributed.rendezvous("env://", **settings):
            yield torch.distributed.PrefixStore(f"attempt {attempt}", store), rank, world

    with suppress(RuntimeError):  # registered already
        torch.distributed.register_rendezvous_handler("attempt", meet)
    return {"init_method": "attempt://"}


def _end_with_the_launcher() -> None:
    """Be told to stop (SIGTERM) when the launcher dies: `accelerate launch` does not pass signals on. Linux alone."""
    if sys.platform == "linux" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & {*os.environ}:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def heartbeat(accelerator: Accelerator, stop: "StopSignal") -> Heartbeat:
    """Whether the other processes live, while it is entered."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return Heartbeat(rank, world, lambda port: broadcast_object_list([port])[0], stop)


def _all_there(started: int) -> None:
    if started != (asked := _asked_for()):
        raise UserError(
            f"the launcher was asked for {asked} processes and started {started}; on CPUs use "
            f"`torchrun --nproc_per_node {asked}` or `accelerate launch --multi_gpu --num_processes {asked}`"
        )


def _asked_for() -> int:
    """How many processes the launcher was asked for.

    `accelerate launch --cpu --num_processes 2` starts one and leaves no trace of the two but its command line.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    parent = psutil.Process().parent()
    command = parent.cmdline() if parent is not None and "ACCELERATE_USE_CPU" in os.environ else []
    if "launch" not in command:
        return 1
    asked, _ = launch_command_parser().parse_known_args(command[command.index("launch") + 1 :])
    if asked.num_processes is None and asked.config_file is not None:
        return int(yaml.safe_load(Path(asked.config_file).read_text()).get("num_processes") or 1)
    return asked.num_processes or 1


class StopRequested(BaseException):
    """A signal told the run to stop; raised where `StopSignal.raising` allows it."""


class StopSignal:
    """While it is entered, notes the signals that tell a run to stop; a second one acts as if nobody listened.

    Within a second it counts as the first again: of one Ctrl-C a launcher makes two, its own and the terminal's.
    """

    ECHO = 1.0  # seconds
    # Ctrl-C; a launcher or a cluster; Slurm's --signal; a terminal that is closed; the limit of CPU time
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)

    def __init__(self) -> None:
        self.signal, self.since = 0, 0.0
        self._raises, self._grace = False, 0.0
        self._arrived = 0

    @contextmanager
    def raising(self) -> Iterator[None]:
        """While it is entered a signal raises `StopRequested`, for what takes long and changes nothing."""
        try:
            self._raises = True
            if self.signal:
                raise StopRequested
            yield
        finally:
            self._raises = False

    def hear(self, number: int) -> None:
        """Another process was told to stop; called from a thread."""
        if self._raises and not self.signal:
            self._grace = time.monotonic() + GRACE
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def __enter__(self) -> "StopSignal":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
        numbers = [number for number in self.SIGNALS if number != signal.SIGHUP or not ignored]
        self.before: dict[int, Any] = {number: signal.signal(number, self._note) for number in numbers}
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        for end in self._pipe:
            os.close(end)

    def arrived(self) -> int:
        """The signal that told this process to stop, or 0; also while its main thread waits for others in a collective.

        There Python calls no handler.
        """
        with suppress(OSError):
            found = [number for number in os.read(self._pipe[0], 64) if number in self.before]
            self._arrived = self._arrived or next(iter(found), 0)
        return self.signal or self._arrived

    def _note(self, number: int, _: object) -> None:
        if not self.signal:
            self.signal, self.since = number, max(time.monotonic(), self._grace)
            if self._raises:
                self._raises = False
                raise StopRequested
        elif number != signal.SIGXCPU and time.monotonic() - self.since > self.ECHO:  # which comes every second
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
