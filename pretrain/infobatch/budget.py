"""A budget: how many visits a whole run may spend, kept to the visit."""

import math
from typing import NamedTuple

SPARSE = 0.05  # least share of an epoch that a budget may come to


class Budget(NamedTuple):
    """A share of the samples that full training would use, N x epochs.

    Attributes:
        share: of them, in (0, 1].
        size: samples, N.
        epochs: E.
        first_full: the epoch with which annealing begins, so every sample is used from then on.
    """

    share: float
    size: int
    epochs: int
    first_full: int

    def check(self, whole_first: bool) -> None:
        """Whether it can be met.

        Args:
            whole_first: the policy uses every sample in the first epoch.

        Raises:
            ValueError: the epochs that use every sample alone exceed it.
        """
        whole = self.epochs - self.first_full + (whole_first and self.first_full > 0)
        least = (whole + SPARSE * (self.epochs - whole)) / self.epochs
        if self.share < min(least, 1):
            raise ValueError(
                f"budget must be at least {math.ceil(100 * least) / 100:g} here, got {self.share}: {whole} of "
                f"{self.epochs} epochs use every sample, the first or those that anneal; give more epochs or a smaller "
                "anneal"
            )

    def of(self, epoch: int, visited: int) -> float:
        """The share of the samples that `epoch` may visit, after so many visits in those before it."""
        if epoch >= self.first_full:
            return 1.0
        left = round(self.share * self.size * self.epochs) - (self.epochs - self.first_full) * self.size - visited
        return min(max(round(left / (self.first_full - epoch)), 1), self.size) / self.size
