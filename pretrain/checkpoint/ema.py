"""Averages of the parameters over progress.

Progress is the clock, not steps: an epoch that skips half of the samples moves an average as far as a whole one. What
an average keeps of itself from one point of the clock to another is the product of what it keeps from point to point in
between, so how epochs are cut into steps does not matter.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn


def exponential(halflife: float) -> Callable[[float, float], float]:
    """What the plain average keeps from one point of the clock to another: half of itself in each `halflife`.

    Early on the half-life is half of the progress made, so that the start is forgotten.
    """

    def kept(before: float, now: float) -> float:
        turn = 2 * halflife  # up to here d log(kept) = -log(2) dp / (p / 2), from here on -log(2) dp / halflife
        early = (min(before, turn) / min(now, turn)) ** (2 * np.log(2))
        return float(early * 0.5 ** ((max(now, turn) - max(before, turn)) / halflife))

    return kept


def exponent(sigma_rel: float) -> float:
    """Gamma of the power-function EMA of a sigma_rel: p(t) ~ t^gamma (Karras et al. 2024, "Analyzing and improving the
    training dynamics of diffusion models", equations 3 and 126: the positive root of a cubic polynomial).

    Raises:
        ValueError: the sigma_rel is not above 0 and at most 0.28; at 0.289 all of the training weighs the same.
    """
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"the sigma_rel of a power-function EMA must be above 0 and at most 0.28, got {sigma_rel}")
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


def power(sigma_rel: float) -> Callable[[float, float], float]:
    """What the power-function EMA of a sigma_rel keeps from one point of the clock to another.

    In steps of equal progress it is (1 - 1/t)^(gamma + 1) (Karras et al. 2024, equation 2).
    """
    gamma = exponent(sigma_rel)
    return lambda before, now: (before / now) ** (gamma + 1)


class EMA:
    """A copy of the network whose parameters follow the network's.

    Args:
        model: the bare network.
        kept: the share of itself that it keeps from one point of the clock to another, later one.
    """

    def __init__(self, model: nn.Module, kept: Callable[[float, float], float]) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.kept = kept

    @torch.no_grad()
    def update(self, model: nn.Module, before: float, now: float) -> None:
        """Move towards the network, which is taken to have been as it is since the clock showed `before`."""
        share = 1 - self.kept(before, now)
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in model.parameters()], share)
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)


class EMACollection:
    """The plain average, and power averages of several sigma_rels, from which any other is made afterwards.

    Args:
        model: the bare network.
        halflife: of the plain average, as a share of the training, above 0.
        sigma_rels: of the power averages: the standard deviation of what they weigh, as a share of the training so far.
    """

    def __init__(self, model: nn.Module, halflife: float, sigma_rels: Sequence[float] = ()) -> None:
        self.plain = EMA(model, exponential(halflife))
        self.powers = {sigma_rel: EMA(model, power(sigma_rel)) for sigma_rel in sigma_rels}
        self.progress = 0.0

    @property
    def model(self) -> nn.Module:
        """The network that is evaluated and exported: the plain average."""
        return self.plain.model

    def all(self) -> dict[str, EMA]:
        """Every average by the name of its file in a checkpoint."""
        return {"ema": self.plain} | {f"ema-{sigma_rel}": average for sigma_rel, average in self.powers.items()}

    def to(self, device: torch.device) -> None:
        """Move them."""
        for average in self.all().values():
            average.model.to(device)

    def update(self, model: nn.Module, progress: float) -> None:
        """Move all towards the network as it is at `progress`."""
        for average in self.all().values():
            average.update(model, self.progress, progress)
        self.progress = progress
