"""How the programs say no (one sentence, exit status 2, no traceback) and how they warn."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

OPEN_FILES = ("Too many open files", "received 0 items of ancdata")  # as torch has it


class UserError(ValueError):
    """Something the user gave can't be used. The message says what was given, what is allowed, what to do.

    Args:
        sentence: the message.
        local: this process alone knows of it (its share of the data), so it speaks whatever its rank.
    """

    def __init__(self, sentence: str, *, local: bool = False) -> None:
        # What was given may hold line breaks and what steers a terminal.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence))
        self.local = local


def warn(sentence: str) -> None:
    """A line on stderr, where no `Display` speaks; from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        _say(f"warning: {sentence}")


def _say(line: str) -> None:
    with suppress(OSError):  # a full disk under it
        print(line, file=sys.stderr, flush=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device, or this machine, has no memory left."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # as torch has it on a CPU
        return True
    return bool({"OutOfMemoryError", "MemoryError"} & {kind.__name__ for kind in type(error).__mro__})


def limit_reached(error: BaseException) -> str:
    """Which limit of the operating system an error, or what led to it, comes from; "" if none."""
    cause: BaseException | None = error
    while cause is not None:
        said = str(cause)
        if getattr(cause, "errno", 0) in (errno.EMFILE, errno.ENFILE) or any(sign in said for sign in OPEN_FILES):
            return "too many files are open; raise the limit (ulimit -n), or give fewer --data.workers"
        if "can't start new thread" in said or isinstance(cause, BlockingIOError):
            return (
                "no more threads or processes can be started; raise the limit (ulimit -u), or give fewer --data.workers"
            )
        cause = cause.__cause__ or cause.__context__
    return ""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn `UserError`, or a lack of memory, into a line on stderr and exit status 2, an interrupt into 130."""
    rank = os.environ.get("RANK", "0")
    try:
        yield
    except UserError as refusal:
        if rank == "0" or refusal.local:
            _say(f"error: {'' if rank == '0' else f'[rank {rank}] '}{refusal}")
        sys.exit(2)
    except Exception as error:
        if limit := limit_reached(error):
            _say(f"error: [rank {rank}] {limit}; a run goes on from its last checkpoint with --resume")
            sys.exit(2)
        if not out_of_memory(error):
            raise
        _say(
            f"error: [rank {rank}] memory ran out ({' '.join(str(error).split('. ')[0].split())}); push fewer images "
            "through at once (in training --micro-batch N or auto, elsewhere --batch-size), or train with "
            "--gradient-checkpointing; a run goes on from its last checkpoint with --resume"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == "0":
            _say(
                "interrupted at once; what was written is kept, and --resume goes on from the last checkpoint of a run"
            )
        sys.exit(130)
