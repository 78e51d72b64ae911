"""Errors for the user, printed as one line with exit status 2 and no traceback; and warnings."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pretrain.core.text import printable

# Errors of a path, and no program's: permissions, names, disks. Path.exists() raises some of them, too.
OF_A_PATH = {
    getattr(errno, name, None)
    for name in ("EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ELOOP", "ENOSPC", "EDQUOT", "EIO", "ESTALE")
}
OPEN_FILES = ("Too many open files", "received 0 items of ancdata")  # the second is torch's message


class UserError(ValueError):
    """An error in what the user gave: a setting, a file, a data set.

    Args:
        message: one sentence: what was given, what is allowed, what to do. Control characters in it are escaped.
        local: whether only this process can know of the error, as it concerns its share of the data. It is then printed
            by any rank, other errors by rank 0 only.
    """

    def __init__(self, message: str, *, local: bool = False) -> None:
        super().__init__(printable(message))
        self.local = local


def _rank() -> str:
    """This process's rank in a launch of several; "0" without one, whatever else the environment has."""
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")
    return os.environ.get("RANK", "0") if several else "0"


def warn(message: str) -> None:
    """Print a warning to stderr, on rank 0 only; for code that has no `Display`."""
    if _rank() == "0":
        _print(f"warning: {printable(message)}")


def _print(line: str) -> None:
    with suppress(OSError):  # stderr is a file on a full disk
        print(line, file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of a device or of the machine is exhausted."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's message on a CPU
        return True
    return bool({"OutOfMemoryError", "MemoryError"} & {kind.__name__ for kind in type(error).__mro__})


def limit_reached(error: BaseException) -> str:
    """The limit of the operating system that an error or its cause comes from, and what to do; "" if none."""
    cause: BaseException | None = error
    while cause is not None:
        message = str(cause)
        if getattr(cause, "errno", 0) in (errno.EMFILE, errno.ENFILE) or any(text in message for text in OPEN_FILES):
            return "too many files are open; raise the limit (ulimit -n), or give fewer --data.workers"
        if "can't start new thread" in message or isinstance(cause, BlockingIOError):
            return (
                "no more threads or processes can be started; raise the limit (ulimit -u), or give fewer --data.workers"
            )
        cause = cause.__cause__ or cause.__context__
    return ""


@contextmanager
def writing_output() -> Iterator[None]:
    """A context for writing to stdout; it ends without an error if no process reads the pipe or the disk is full."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # what is still in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_interpreter() -> None:
    """Give libraries streams to write to if they were closed, and refuse to run without docstrings."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the end of the process
    if sys.flags.optimize > 1:
        raise UserError(
            "python -OO (PYTHONOPTIMIZE=2) removes docstrings, which --help and diffusers need; use -O at most"
        )


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with one line on stderr: status 2 on `UserError`, a path that can't be used or memory that ran out; 130 on
    an interrupt.
    """
    rank = _rank()
    try:
        _check_interpreter()
        yield
    except UserError as error:
        if rank == "0" or error.local:
            _print(f"error: {'' if rank == '0' else f'[rank {rank}] '}{error}")
        sys.exit(2)
    except Exception as error:
        if limit := limit_reached(error):
            _print(f"error: [rank {rank}] {limit}; a run can be resumed from its last checkpoint with --resume")
            sys.exit(2)
        if isinstance(error, OSError) and error.filename is not None and error.errno in OF_A_PATH:
            path = printable(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename))
            _print(f"error: [rank {rank}] {path}: {error.strerror}; give a path that this user can read or write")
            sys.exit(2)
        if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):  # of Path.resolve()
            _print(f"error: [rank {rank}] {printable(str(error))}; give a path without it")
            sys.exit(2)
        if not is_out_of_memory(error):
            raise
        _print(
            f"error: [rank {rank}] memory ran out ({' '.join(str(error).split('. ')[0].split())}); process fewer "
            "images at once (in training with --micro-batch N or auto, elsewhere with --batch-size), or train with "
            "--gradient-checkpointing; --resume continues a run from its last checkpoint"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == "0":
            _print(
                "interrupted at once; files already written are kept, and --resume continues a run that has a "
                "checkpoint"
            )
        sys.exit(130)
