"""A data set wrapper that returns each sample's index beside it, for use of InfoBatch without our trainers."""

from collections.abc import Mapping, Sequence
from operator import index as whole
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, IterableDataset

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
        try:
            number = whole(index)
        except TypeError:
            raise TypeError(
                f"Indexed takes the index of one sample, got {type(index).__name__}; let the DataLoader make "
                "the batches, with batch_size= or batch_sampler="
            ) from None
        item: Any = self.data[sample_of(number)]
        fields = cast(Sequence[Any], item) if isinstance(item, (tuple, list)) else (item,)
        return index, *fields


def length(data: Any) -> int:
    """The number of samples of a data set.

    Raises:
        TypeError: it is not a map-style data set.
    """
    name = type(data).__name__
    if isinstance(data, (IterableDataset, DataLoader, Mapping, str, bytes)) or not hasattr(data, "__len__"):
        raise TypeError(
            f"InfoBatch needs a map-style data set, whose samples have an index; got {name}; give an "
            "object with `__getitem__` and `__len__`, not an iterable, a loader, or a dict of splits or columns"
        )
    return len(data)
