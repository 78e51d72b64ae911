"""A budget: how many samples a whole run uses, kept exactly."""

import math
from typing import NamedTuple

MIN_SHARE = 0.05  # of the samples, on average, in the epochs that don't use all of them


class Budget(NamedTuple):
    """A share of the samples that full training would use, N x epochs.

    Attributes:
        share: of them, in (0, 1].
        size: samples, N.
        epochs: E.
        first_full: the first epoch of annealing; from it on every sample is used.
    """

    share: float
    size: int
    epochs: int
    first_full: int

    def check(self, first_epoch_full: bool) -> None:
        """Raise if the budget can't be met.

        Args:
            first_epoch_full: whether the policy uses every sample in the first epoch.

        Raises:
            ValueError: the epochs that use every sample exceed it by themselves.
        """
        whole = self.epochs - self.first_full + (first_epoch_full and self.first_full > 0)
        lowest = (whole + MIN_SHARE * (self.epochs - whole)) / self.epochs
        if self.share < min(lowest, 1):
            raise ValueError(
                f"budget must be at least {math.ceil(100 * lowest) / 100:g}, got {self.share}: every sample is used in "
                f"{whole} of {self.epochs} epochs, the first or those of annealing; give more epochs, or no pruning"
            )

    def share_of(self, epoch: int, used: int) -> float:
        """The share of the samples that `epoch` may use, after `used` samples in the epochs before it."""
        if epoch >= self.first_full:
            return 1.0
        left = round(self.share * self.size * self.epochs) - (self.epochs - self.first_full) * self.size - used
        return min(max(round(left / (self.first_full - epoch)), 1), self.size) / self.size
