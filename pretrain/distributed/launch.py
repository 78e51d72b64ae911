"""Starting as one of the processes of a launch by accelerate, and signals to stop."""

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

NUMBERS = {
    name: 2**16 - 1
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
}  # variables of launchers, and the largest values
REQUIRED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # for several processes
GRACE = 30.0  # seconds in which a process's own signal counts as the one that another process received before it


def start(output_dir: Path, precision: str, tracker: str | None) -> Accelerator:
    """Make this process's `Accelerator`, for training.

    Args:
        output_dir: folder of the run.
        precision: "no", "fp16" or "bf16".
        tracker: an experiment tracker of accelerate, or None.

    Raises:
        UserError: the launcher started another number of processes than requested, it was configured for another
            precision or for sharding the model, or the precision or the tracker is not available here.
    """
    _check_environment()
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if launched not in ("", "no", precision):
        raise UserError(
            f"accelerate was launched with mixed precision {launched}, the run has --precision {precision}; give "
            f"--precision {launched}"
        )
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "").lower() not in ("", "0", "false", "no", "off"):
            raise UserError(
                f"accelerate was launched with {plugin}, whose settings are not used here; launch without it, and give "
                "--shard to split the model over the processes"
            )
    if (dynamo := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").lower()) not in ("", "no"):
        raise UserError(
            f"accelerate was launched with the dynamo backend {dynamo}; launch without it, and give --compile instead"
        )
    rendezvous: dict[str, Any] = _rendezvous()
    folder = ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "trackers"))
    with _reported():
        accelerator = Accelerator(
            # Otherwise torchrun on a CPU gives independent runs that all have rank 0.
            cpu="WORLD_SIZE" in os.environ and not torch.cuda.is_available(),
            mixed_precision=precision,
            # Explicit, because the default is accelerate's own config file, and losses are divided by this number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=tracker,
            project_config=folder,
            kwargs_handlers=[InitProcessGroupKwargs(**rendezvous)] if rendezvous else None,
        )
    _check_world_size(accelerator.num_processes)
    _stop_with_launcher()
    if tracker and not accelerator.log_with:
        raise UserError(f"--tracker {tracker}: its package is not installed; pip install {tracker}")
    atexit.register(accelerator.state.destroy_process_group)
    return accelerator


def join() -> PartialState:
    """Make this process's `PartialState`, for commands that do not train.

    Raises:
        UserError: the launcher started another number of processes than requested, or with different arguments.
    """
    _check_environment()
    with _reported():
        state = PartialState(cpu="WORLD_SIZE" in os.environ and not torch.cuda.is_available(), **_rendezvous())
    _check_world_size(state.num_processes)
    atexit.register(state.destroy_process_group)
    require_same_settings({"the command": shlex.join(sys.argv[1:])})
    return state


@contextmanager
def _reported() -> Iterator[None]:
    """Errors of accelerate, and of torch if the processes don't find each other, as errors of one sentence."""
    try:
        yield
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    except torch.distributed.DistError as error:
        address = f"MASTER_ADDR {os.environ.get('MASTER_ADDR')}, MASTER_PORT {os.environ.get('MASTER_PORT')}"
        reason = str(error).split("\n")[0][:300]
        raise UserError(f"the processes of the launch can't meet at {address}: {reason}", local=True) from None


def _check_environment() -> None:
    """Check the environment variables by which a launcher tells a process which one of them it is.

    Raises:
        UserError: one is missing or is not what it should be. Any process can be the only one with such an error.
    """
    hint = "start with torchrun or accelerate launch, which set it, or unset it"
    given: dict[str, int] = {}
    for name, largest in NUMBERS.items():
        text = os.environ.get(name)
        if text is None:
            continue
        smallest = int(name == "WORLD_SIZE")
        if not (text.isascii() and text.isdigit() and smallest <= int(text) <= largest):
            allowed = f"a whole number from {smallest} to {largest:,}"
            raise UserError(f"the environment variable {name} must be {allowed}, got {text!r}; {hint}", local=True)
        given[name] = int(text)
    several = given.get("WORLD_SIZE", 1) > 1 or "LOCAL_RANK" in given
    if several and (missing := [name for name in REQUIRED if not os.environ.get(name)]):
        there = "WORLD_SIZE" if "WORLD_SIZE" in given else "LOCAL_RANK"
        raise UserError(
            f"the environment variable {there} is set and {missing[0]} is not; {hint.replace(' it,', ' both,')}",
            local=True,
        )
    if several and given["RANK"] >= given["WORLD_SIZE"]:
        limits = f"below {given['WORLD_SIZE']} (WORLD_SIZE), got {given['RANK']}"
        raise UserError(f"the environment variable RANK must be {limits}; {hint}", local=True)


def _rendezvous() -> dict[str, str]:
    """Arguments of `init_process_group` for processes that torchrun has restarted; none for others.

    torchrun's store still has the keys of the attempt before; a process that reads them would wait for one that is
    gone. So each attempt has its own keys.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return {}

    def handler(url: str, **settings: Any) -> Iterator[tuple[torch.distributed.Store, int, int]]:
        for store, rank, world in torch.distributed.rendezvous("env://", **settings):
            yield torch.distributed.PrefixStore(f"attempt {attempt}", store), rank, world

    with suppress(RuntimeError):  # registered already
        torch.distributed.register_rendezvous_handler("attempt", handler)
    return {"init_method": "attempt://"}


def _stop_with_launcher() -> None:
    """Receive SIGTERM when the launcher ends, because `accelerate launch` does not forward signals. Linux only."""
    if sys.platform == "linux" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & {*os.environ}:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def heartbeat(accelerator: Accelerator, stop_signal: "StopSignal") -> Heartbeat:
    """The heartbeat of an accelerator's processes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return Heartbeat(rank, world, lambda port: broadcast_object_list([port])[0], stop_signal)


def _check_world_size(started: int) -> None:
    if started != (requested := _requested_world_size()):
        raise UserError(
            f"the launcher was asked for {requested} processes and started {started}; on CPUs use "
            f"`torchrun --nproc_per_node {requested}` or `accelerate launch --multi_gpu --num_processes {requested}`"
        )


def _requested_world_size() -> int:
    """The number of processes that the launcher was asked for.

    `accelerate launch --cpu --num_processes 2` starts one process; only its command line shows that two were requested.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    parent = psutil.Process().parent()
    command = parent.cmdline() if parent is not None and "ACCELERATE_USE_CPU" in os.environ else []
    if "launch" not in command:
        return 1
    given, _ = launch_command_parser().parse_known_args(command[command.index("launch") + 1 :])
    if given.num_processes is None and given.config_file is not None:
        return int(yaml.safe_load(Path(given.config_file).read_text()).get("num_processes") or 1)
    return given.num_processes or 1


class StopRequested(BaseException):
    """A signal to stop, raised inside `StopSignal.raising`."""


class StopSignal:
    """A context that records a signal to stop, so that the loop can write a checkpoint and exit.

    A second signal has its usual effect. One within `REPEAT_WINDOW` of the first is ignored: on one Ctrl-C a process
    receives a signal from the terminal and another one from its launcher.

    Attributes:
        signal: number of the signal; 0 if there was none.
        since: time.monotonic() of the signal.
    """

    REPEAT_WINDOW = 1.0  # seconds
    # Ctrl-C; a launcher or a cluster; Slurm's --signal; a closed terminal; the limit of CPU time
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)

    def __init__(self) -> None:
        self.signal, self.since = 0, 0.0
        self._raises, self._grace = False, 0.0
        self._arrived = 0

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A context in which a signal raises `StopRequested`; for code that takes long and changes no state."""
        try:
            self._raises = True
            if self.signal:
                raise StopRequested
            yield
        finally:
            self._raises = False

    def forward(self, number: int) -> None:
        """Treat a signal that another process received as this one's, inside `raising`; called from a thread."""
        if self._raises and not self.signal:
            self._grace = time.monotonic() + GRACE
            signal.pthread_kill(threading.main_thread().ident or 0, number)

    def __enter__(self) -> "StopSignal":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
        numbers = [number for number in self.SIGNALS if number != signal.SIGHUP or not ignored]
        self.before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in numbers}
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
        """The number of the signal to stop that this process received, or 0.

        It is known also while the main thread waits in a collective, where Python calls no handler.
        """
        with suppress(OSError):
            found = [number for number in os.read(self._pipe[0], 64) if number in self.before]
            self._arrived = self._arrived or next(iter(found), 0)
        return self.signal or self._arrived

    def _handle(self, number: int, _: object) -> None:
        if not self.signal:
            self.signal, self.since = number, max(time.monotonic(), self._grace)
            if self._raises:
                self._raises = False
                raise StopRequested
        elif number != signal.SIGXCPU and time.monotonic() - self.since > self.REPEAT_WINDOW:  # SIGXCPU repeats
            signal.signal(number, self.before[number])
            signal.raise_signal(number)
