"""A data set wrapper that returns each sample's index beside it, for use of InfoBatch without our trainers."""

from typing import Any

from torch.utils.data import Dataset, IterableDataset

from pretrain.core.padding import sample_of


class Indexed(Dataset[tuple[Any, ...]]):
    """A map-style data set with the index in front: ``Indexed(data)[i]`` is ``(i, *data[i])``.

    For the padding index ``~i`` it returns sample i, with ``~i`` in front.

    Args:
        data: a map-style data set. A sample that is not a tuple or list counts as one field.
    """

    def __init__(self, data: Any) -> None:
        length(data)
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.data[sample_of(index)]
        return (index, *item) if isinstance(item, (tuple, list)) else (index, item)


def length(data: Any) -> int:
    """The number of samples of a data set.

    Raises:
        TypeError: it is not a map-style data set.
    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise TypeError(
            "InfoBatch needs a map-style data set, whose samples have an index; got "
            f"{type(data).__name__}, an iterable one; give one with `__getitem__` and `__len__`"
        )
    return len(data)
