"""A subset of the training images, by `--data.subset FILE`: a JSON file of indices, and of weights if it has some.

`pretrain coreset` writes such files. A plain list of indices is one, too.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.core.errors import UserError
from pretrain.core.files import expand, read_json

OWN = "a list of your own"  # the method of a file that does not name one
BIAS = {True: "biased", False: "unbiased (over seeds; this is one draw)", None: "whether it is biased is not known"}


class Subset(NamedTuple):
    """Which training images are used.

    Attributes:
        index: int64 [n], ascending; their numbers among the N training images.
        weights: float32 [n], 1 on average; what each counts for. None: all alike.
        size: N, the training images that there are.
        method: by which they were selected.
        biased: whether their (weighted) mean differs from that of all images in expectation over seeds; None: unknown.
        fingerprint: of these images (see `pretrain.data.fingerprint.digest`); "" if the file has none.
        file: that names them.
    """

    index: np.ndarray
    weights: Tensor | None
    size: int
    method: str
    biased: bool | None
    fingerprint: str
    file: str

    @property
    def digest(self) -> str:
        """A hash of the indices and weights, by which a resumed run notices another subset."""
        weights = b"" if self.weights is None else self.weights.numpy().tobytes()
        return hashlib.sha256(self.index.astype("<i8").tobytes() + weights).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report, without the indices."""
        return {
            "file": self.file,
            "used": len(self.index),
            "of": self.size,
            "method": self.method,
            "biased": self.biased,
            "weighted": self.weights is not None,
            "digest": self.digest,
        }


def describe(subset: Mapping[str, Any]) -> str:
    """A line for the user about `Subset.to_dict`."""
    text = f"{subset['file']}: {subset['used']:,} of {subset['of']:,} training images, selected by {subset['method']}"
    return f"{text}, {'weighted, ' if subset['weighted'] else ''}{BIAS[subset['biased']]}"


def read_subset(file: str | Path, size: int) -> Subset:
    """Read a subset of a data set.

    Args:
        file: JSON; a list of indices, or an object with `indices` and optionally `weights` (one for each index),
            `size`, `method`, `biased` and `fingerprint`.
        size: N, the training images of the data set.

    Raises:
        UserError: it can't be read, or is no subset of these images.
    """
    flag = f"--data.subset {file}"
    try:
        found = read_json(expand(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: it can't be read as JSON: {' '.join(str(error).split())}") from None
    values = {"indices": found} if isinstance(found, list) else found
    if not isinstance(values, dict) or not isinstance(values.get("indices"), list) or not values["indices"]:
        raise UserError(f"{flag}: it must be a list of indices, or what `pretrain coreset` wrote; give such a file")
    made_of = values.get("size", size)
    if made_of != size:
        raise UserError(
            f"{flag}: it is of a data set of {made_of!r} training images, --data has {size}; give the subset of this "
            "data set, with the same --data.* settings"
        )
    index = _indices(values["indices"], size, flag)
    order, weights = index.argsort(), values.get("weights")
    weights = None if weights is None else _weights(weights, len(index), flag)
    method, biased, mark = (values.get(name) for name in ("method", "biased", "fingerprint"))
    return Subset(
        index[order],
        None if weights is None else weights[torch.from_numpy(order)],
        size,
        method if isinstance(method, str) else OWN,
        biased if isinstance(biased, bool) else None,
        mark if isinstance(mark, str) else "",
        str(file),
    )


def _indices(values: Sequence[Any], size: int, flag: str) -> np.ndarray:
    """int64; the indices of a file.

    Raises:
        UserError: one is not a whole number in [0, size), or is given twice.
    """
    for value in values:
        if type(value) is not int or not 0 <= value < size:
            raise UserError(f"{flag}: indices must be whole numbers from 0 to {size - 1}, got {_short(value)}")
    index = np.array(values, dtype=np.int64)
    found, count = np.unique(index, return_counts=True)
    if len(found) < len(index):
        raise UserError(f"{flag}: index {found[count > 1][0]} is given twice; give each image once")
    return index


def _weights(values: Any, count: int, flag: str) -> Tensor | None:
    """float32, divided by their mean; None if all are alike.

    Raises:
        UserError: they are not one positive, finite number for each index.
    """
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else _short(values)
        raise UserError(f"{flag}: weights must be a list of {count} numbers, one for each index, got {got}")
    for value in values:
        if type(value) not in (int, float) or not 0 < value <= 1e30:  # NaN fails, too
            raise UserError(f"{flag}: weights must be positive and finite (up to 1e30), got {_short(value)}")
    mean = math.fsum(values) / count
    weights = torch.tensor([value / mean for value in values], dtype=torch.float32)
    if not (weights > 0).all():
        raise UserError(f"{flag}: the smallest weight, {min(values):g}, is too small beside their mean, {mean:g}")
    return None if (weights == weights[0]).all() else weights


def _short(value: Any) -> str:
    return repr(value)[:40]
