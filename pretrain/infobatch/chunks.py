"""Work on many samples, a chunk at a time, in as many threads as torch uses."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

CHUNK = 1 << 15  # samples: a few arrays of them fit into a core's cache, and torch itself uses one thread

T = TypeVar("T")


def map_chunks(function: Callable[[int], T], size: int) -> Iterator[T]:
    """The results of ``function(first)`` for first = 0, CHUNK, 2 CHUNK, ... below `size`, in this order.

    The calls run side by side, and so must not write to the same places.
    """
    firsts = range(0, size, CHUNK)
    if len(firsts) < 2:
        yield from map(function, firsts)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            yield from threads.map(function, firsts)
