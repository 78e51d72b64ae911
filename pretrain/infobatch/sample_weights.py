"""What each sample counts for, beside the weight that the plan gives it."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class SampleWeights:
    """A factor of each sample's weight; 1 for all if there are none.

    Args:
        weights: [N], positive and finite; None: 1.
        size: samples, N.

    Attributes:
        mark: a hash of them, in [0, 2^63), in a list; empty without any.

    Raises:
        ValueError: they are not one positive, finite number for each sample.
    """

    def __init__(self, weights: Tensor | Sequence[float] | None, size: int) -> None:
        self._tables: dict[torch.device, Tensor] = {}  # float32 [N], by device
        self.mark: list[int] = []
        if weights is None:
            return
        try:
            table = torch.as_tensor(weights).detach().to("cpu", torch.float32, copy=True)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"weights must be numbers, one per sample, got {type(weights).__name__}") from None
        if table.shape != (size,):
            raise ValueError(f"weights must be one number for each of {size} samples, got shape {tuple(table.shape)}")
        good = table.isfinite() & (table > 0)
        if not good.all():
            first = int((~good).int().argmax())
            raise ValueError(
                f"weights must be positive and finite, got {table[first].item():g} for sample {first}; leave samples "
                "that count for nothing out of the data set"
            )
        self._tables[table.device] = table
        self.mark = [int.from_bytes(hashlib.blake2b(table.numpy().tobytes(), digest_size=8).digest(), "little") >> 1]

    def times(self, weight: Tensor, sample: Tensor) -> Tensor:
        """Weights [B] of samples, int64 [B], times theirs; copied to the device once."""
        if not self._tables:
            return weight
        if sample.device not in self._tables:
            self._tables[sample.device] = self._tables[torch.device("cpu")].to(sample.device)
        return weight * self._tables[sample.device][sample]

    def state_dict(self) -> dict[str, int]:
        """By which `checked_state` notices other weights; empty without any."""
        return {"weights": self.mark[0]} if self.mark else {}
