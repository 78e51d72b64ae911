"""Padding: entries of a batch that are carried along and count for nothing.

All processes take a step together. Where the samples that are left do not fill the last one, or an image can't be read,
an entry of the batch is padding: its index is ``~i``, which is negative, for some sample ``i``. Its loss has weight 0
and no score is stored.
"""

from typing import TypeVar

from torch import Tensor

Index = TypeVar("Index", int, Tensor)


def sample_of(index: Index) -> Index:
    """The sample of an index, an int or int64 of any shape: ``i`` for both ``i`` and its padding ``~i``."""
    return index ^ (index >> 63)  # the shift gives 0, or -1 where it is negative, and x ^ -1 is ~x


def is_padding(index: Tensor) -> Tensor:
    """bool, of the shape of `index`: which entries are padding."""
    return index < 0
