"""Data sets whose samples come with their numbers, for whoever uses InfoBatch without the trainers."""

from typing import Any

from torch.utils.data import Dataset, IterableDataset


class Indexed(Dataset[tuple[Any, ...]]):
    """A data set with every sample's number before it: ``Indexed(data)[i]`` is ``(i, *data[i])``.

    A number ``~i``, by which InfoBatch marks a slot that does not count, brings sample i under that number.

    Args:
        data: samples by number; what is not a tuple or a list is one thing.
    """

    def __init__(self, data: Any) -> None:
        length(data)
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.data[~index if index < 0 else index]
        return (index, *item) if isinstance(item, (tuple, list)) else (index, item)


def length(data: Any) -> int:
    """A data set's length.

    Raises:
        TypeError: its samples have no numbers.
    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise TypeError(
            f"InfoBatch needs a data set whose samples have numbers, got {type(data).__name__}, which is read in its "
            "own order; give one with `__getitem__` and `__len__`"
        )
    return len(data)
