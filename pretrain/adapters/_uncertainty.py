"""What an objective makes of levels: densities and weights that change what is learned.

A plan may visit some levels more densely than others too, and divides a visit's weight by the density: that changes
the variance of the gradient and nothing else. What is here is not made up for. A map from the level, uniform on
average, to an adapter's own axis says how much each noise level counts in the objective, and so does a weight; a model
that could learn everything would not care, any other one learns best what counts most.
"""

import torch
from torch import Tensor, nn

from pretrain.core.rng import SampleRNG

Masks = tuple[Tensor, Tensor, Tensor | None]


def normal_quantile(level: Tensor, mean: float, std: float) -> Tensor:
    """Levels in [0, 1) spread like a normal distribution; level 0 counts as 2^-25, whose quantile is finite."""
    return mean + std * torch.special.ndtri(level.clamp(min=2.0**-25))


def oversample_below(level: Tensor, below: float, times: float) -> Tensor:
    """Levels in [0, 1) spread so that those below `below` are `times` times as dense as the others."""
    if times == 1:
        return level
    dense = times * below  # is to 1 - below as the two parts' shares are
    place = level * (dense + 1 - below)
    return torch.where(place < dense, place / times, place - dense + below).clamp(max=1 - 2.0**-24)


def snr_weight(snr: Tensor, prediction: str, min_snr: float | None, p2: float | None) -> Tensor:
    """Weight of the squared error of what is predicted.

    The squared errors of noise and velocity are SNR and SNR + 1 times that of the image they imply, so one and the
    same weight of the image's error is divided by that.

    Args:
        snr: signal-to-noise ratios of the visits, above 0.
        prediction: "epsilon", "sample" or "v_prediction".
        min_snr: gamma of min(SNR, gamma), the weight of the image's error (Hang et al. 2023); or None.
        p2: gamma of (1 + SNR)^-gamma, the weight of the noise's error (Choi et al. 2022, k = 1); or None.
    """
    of_image = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction]
    if min_snr is not None:
        return snr.clamp(max=min_snr) / of_image
    if p2 is not None:
        return snr / (1 + snr) ** p2 / of_image
    return torch.ones_like(snr)


def random_masks(patches: int, ratio: float, most: float | None, share: float, level: Tensor, rng: SampleRNG) -> Masks:
    """Which patches are visible and which hidden: int64 [B, V] and [B, H], in random order, at least one of each.

    Args:
        patches: L.
        ratio: share that is hidden at level 0.
        most: share that is hidden at level 1, evenly more in between; None: `ratio` at any level.
        share: of the hidden ones that is asked for.
        level: [B].
        rng: draws them.

    Returns:
        Both; where their numbers vary, V and H are the largest, and the third, bool [B, V + H], says which are meant.
    """
    order = rng.uniform(patches).argsort(dim=1)
    largest = min(max(round(patches * (1 - ratio)), 1), patches - 1)
    least = largest if most is None else min(max(round(patches * (1 - most)), 1), largest)
    asked = max(round(share * (patches - least)), 1)  # the last ones: they are hidden at any level
    if most is None:
        return order[:, :largest], order[:, -asked:], None
    visible = (patches * (1 - ratio - level * (most - ratio))).round().clamp(least, largest)[:, None]
    place = torch.arange(patches, device=order.device)
    there = torch.cat([place[:largest] < visible, place[-asked:] >= visible], dim=1)
    return order[:, :largest], order[:, -asked:], there


class UncertaintyHead(nn.Module):
    """A denoiser, and beside it how large its error usually is at a time (Karras et al. 2024; Kendall et al. 2018).

    The log error is a constant and a sum of sines and cosines of 1 .. 16 times the time, 0 in the beginning. Its
    parameters are among the network's, so they are trained, averaged and saved with them.

    Args:
        network: called as ``network(x, time, label)``, time [B] between -pi and pi.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.log_error = nn.Linear(32, 1)
        nn.init.zeros_(self.log_error.weight)
        nn.init.zeros_(self.log_error.bias)

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor, uncertainty: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The network's output; with `uncertainty` also the log error, float32 [B]."""
        output = self.network(x, time, label)
        if not uncertainty:
            return output
        phase = time[:, None] * torch.arange(1, 17, device=time.device)
        with torch.autocast(time.device.type, enabled=False):  # it is a part of the loss
            return output, self.log_error(torch.cat([phase.cos(), phase.sin()], dim=1)).squeeze(1)
