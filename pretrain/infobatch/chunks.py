"""Work on many samples, a chunk at a time, in as many threads as torch uses."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

CHUNK = 1 << 18  # samples; with fewer, threads wait for Python's lock for longer than they work

T = TypeVar("T")


def map_chunks(function: Callable[[int], T], size: int) -> Iterator[T]:
    """The results of ``function(first)`` for first = 0, CHUNK, 2 CHUNK, ... below `size`, in this order.

    The calls run side by side, and so must not write to the same places.
    """
    firsts, threads = range(0, size, CHUNK), torch.get_num_threads()
    if threads == 1 or len(firsts) < 2:
        yield from map(function, firsts)
        return
    try:  # each operation of torch in the thread that calls it; `set_num_threads` is for that and for new threads
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, firsts)
    finally:
        torch.set_num_threads(threads)
