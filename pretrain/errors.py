"""How the programs say no (one sentence, exit status 2, no traceback) and how they warn."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Refused(ValueError):
    """Something the user gave can't be used. The message says what was given, what is allowed, what to do.

    Args:
        sentence: the message.
        local: this process alone knows of it (its share of the data), so it speaks whatever its rank.
    """

    def __init__(self, sentence: str, *, local: bool = False) -> None:
        super().__init__(sentence)
        self.local = local


def warn(sentence: str) -> None:
    """A line on stderr, where no `Display` speaks; from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn `Refused` into a line on stderr and exit status 2, an interrupt that nobody caught into 130."""
    rank = os.environ.get("RANK", "0")
    try:
        yield
    except Refused as refusal:
        if rank == "0" or refusal.local:
            print(f"error: {'' if rank == '0' else f'[rank {rank}] '}{refusal}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == "0":
            print(
                "interrupted at once; what was written is kept, and --resume goes on from the last checkpoint of a run",
                file=sys.stderr,
            )
        sys.exit(130)
