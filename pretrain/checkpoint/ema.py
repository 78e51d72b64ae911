"""Exponential moving averages (EMA) of the parameters, over progress instead of steps.

Progress is the share of the training that is done, in [0, 1]. An epoch that skips half of its samples has half the
steps but moves progress, and so the EMAs, as far as a full one. A decay function gives the factor of the old EMA
between two values of progress; it is multiplicative, so how an epoch is divided into steps makes no difference.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pretrain.distributed.sharding import gathered, shard_like

Decay = Callable[[float, float], float]  # (progress before, progress now) -> factor in [0, 1] of the old EMA


def exponential_decay(halflife: float) -> Decay:
    """The decay of an exponential moving average.

    As long as progress is below 2 * halflife, the half-life is progress / 2, so that the initial parameters are
    forgotten.

    Args:
        halflife: as a share of the training, above 0.
    """

    def decay(before: float, now: float) -> float:
        ramp_end = 2 * halflife  # below it d log(decay) = -log(2) dp / (p / 2), above it -log(2) dp / halflife
        ramp = (min(before, ramp_end) / min(now, ramp_end)) ** (2 * np.log(2))
        return float(ramp * 0.5 ** ((max(now, ramp_end) - max(before, ramp_end)) / halflife))

    return decay


def exponent(sigma_rel: float) -> float:
    """Gamma of a power-function EMA, whose weight of the parameters at time t is proportional to t^gamma.

    Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", equations 3 and 126: the
    positive root of a cubic polynomial.

    Args:
        sigma_rel: standard deviation of t under these weights, as a share of the training so far.

    Raises:
        ValueError: sigma_rel is not above 0 and at most 0.28; at 0.289 the weights are uniform.
    """
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"the sigma_rel of a power-function EMA must be above 0 and at most 0.28, got {sigma_rel}")
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


def power_decay(sigma_rel: float) -> Decay:
    """The decay of a power-function EMA, (before / now)^(gamma + 1).

    In step t of equal steps this is (1 - 1/t)^(gamma + 1) (Karras et al. 2024, equation 2).

    Raises:
        ValueError: see `exponent`.
    """
    gamma = exponent(sigma_rel)
    return lambda before, now: (before / now) ** (gamma + 1)


class EMA:
    """A copy of a network whose parameters are a moving average of the network's; buffers are copied.

    Args:
        model: the bare network.
        decay: factor of the old average between two values of progress.
    """

    def __init__(self, model: nn.Module, decay: Decay) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, before: float, now: float) -> None:
        """Average in the network's parameters, as if they had been the same from progress `before` to `now`."""
        share = 1 - self.decay(before, now)
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in model.parameters()], share)
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)


class EMACollection:
    """The exponential EMA of a run, and power-function EMAs from which others are reconstructed after the run.

    Args:
        model: the bare network.
        halflife: of the exponential EMA, as a share of the training, above 0.
        sigma_rels: of the power-function EMAs, each above 0 and at most 0.28.

    Attributes:
        exponential: the EMA that is evaluated and exported.
        powers: power-function EMAs by sigma_rel.
        progress: of the training at the last update.

    Raises:
        ValueError: see `exponent`.
    """

    def __init__(self, model: nn.Module, halflife: float, sigma_rels: Sequence[float] = ()) -> None:
        self.exponential = EMA(model, exponential_decay(halflife))
        self.powers = {sigma_rel: EMA(model, power_decay(sigma_rel)) for sigma_rel in sigma_rels}
        self.progress = 0.0

    @property
    def model(self) -> nn.Module:
        """The network that is evaluated and exported: the exponential EMA.

        Of sharded parameters it is a copy with whole ones, made by all processes, which all use this at once.
        """
        return gathered(self.exponential.model)

    def all(self) -> dict[str, EMA]:
        """All EMAs by the name of their file in a checkpoint."""
        return {"ema": self.exponential} | {f"ema-{sigma_rel}": ema for sigma_rel, ema in self.powers.items()}

    def to(self, device: torch.device) -> None:
        """Move all EMAs to a device."""
        for ema in self.all().values():
            ema.model.to(device)

    def shard_like(self, model: nn.Module) -> None:
        """Shard all EMAs as the network is sharded."""
        for ema in self.all().values():
            shard_like(ema.model, model)

    def update(self, model: nn.Module, progress: float) -> None:
        """Average in the network's parameters at `progress`, which must not be below that of the last update."""
        for ema in self.all().values():
            ema.update(model, self.progress, progress)
        self.progress = progress

    def state_dict(self) -> dict[str, Any]:
        """The progress, and by the names of `all` the parameters and buffers of each EMA, not copied."""
        return {"progress": self.progress} | {name: ema.model.state_dict() for name, ema in self.all().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it has other EMAs than this collection.
            RuntimeError: its EMAs are of another network.
        """
        own = self.all()
        if (saved := state.keys() - {"progress"}) != own.keys():
            sigma_rels = " ".join(sorted(name.removeprefix("ema-") for name in saved if name.startswith("ema-")))
            raise ValueError(f"the state's --ema.sigma-rel are {sigma_rels or 'none'}; leave the setting out")
        for name, ema in own.items():
            ema.model.load_state_dict(state[name])
        self.progress = state["progress"]
