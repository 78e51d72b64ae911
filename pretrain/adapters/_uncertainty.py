"""Densities and weights of noise levels, patch masks, and the learned uncertainty of EDM2: building blocks of adapters.

An adapter's density and weight of noise levels are part of the objective. A model of unlimited capacity would learn the
same under any of them; a real one learns best the levels that count most. InfoBatch, too, may draw some levels more
densely, but divides the loss by that density, which changes only the variance of the gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.core.rng import SampleRNG


class Masks(NamedTuple):
    """The visible and the hidden patches of each image, in random order."""

    visible: Tensor  # int64 [B, V]; indices of patches
    hidden: Tensor  # int64 [B, H]
    valid: Tensor | None  # bool [B, V + H]; False for entries to ignore; None: all are valid


def normal_quantile(level: Tensor, mean: float, std: float) -> Tensor:
    """Quantiles of a normal distribution.

    Args:
        level: float32, each in [0, 1); 0 is replaced by 2^-25, whose quantile is finite.
        mean, std: of the distribution.

    Returns:
        float32, of the shape of `level`.
    """
    return mean + std * torch.special.ndtri(level.clamp(min=2.0**-25))


def snr_weight(snr: Tensor, prediction: str, min_snr: float | None) -> Tensor:
    """Weight of the squared error of the prediction, min-SNR; 1 if it is not given.

    The squared errors of noise and of velocity are SNR and SNR + 1 times that of the image that they imply, so a weight
    of the image's error is divided by these factors.

    Args:
        snr: float32 [B]; signal-to-noise ratios, above 0.
        prediction: "epsilon", "sample" or "v_prediction".
        min_snr: gamma of min(SNR, gamma), a weight of the image's error (Hang et al., 2023).

    Returns:
        float32 [B].
    """
    image_factor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction]
    if min_snr is not None:
        return snr.clamp(max=min_snr) / image_factor
    return torch.ones_like(snr)


def random_masks(
    patches: int, mask_ratio: float, max_ratio: float | None, predict: float, level: Tensor, rng: SampleRNG
) -> Masks:
    """Draw visible and hidden patches uniformly, at least one of each (He et al., 2022, section 3).

    Args:
        patches: of an image, L.
        mask_ratio: share of the patches that is hidden at level 0, in (0, 1).
        max_ratio: share that is hidden at level 1; it is linear in the level. None: `mask_ratio` at every level.
        predict: H as a share of the patches that are hidden at level 1, in (0, 1].
        level: float32 [B], each in [0, 1).
        rng: of the B samples.

    Returns:
        V and H are the same for all images, the largest numbers that occur; with `max_ratio` `valid` marks the entries
        of each image.
    """
    order = rng.uniform(patches).argsort(dim=1)
    max_visible = min(max(round(patches * (1 - mask_ratio)), 1), patches - 1)
    min_visible = max_visible if max_ratio is None else min(max(round(patches * (1 - max_ratio)), 1), max_visible)
    predicted = max(round(predict * (patches - min_visible)), 1)  # the last in `order`, which are hidden first
    visible, hidden = order[:, :max_visible], order[:, -predicted:]
    if max_ratio is None:
        return Masks(visible, hidden, None)
    count = (patches * (1 - mask_ratio - level * (max_ratio - mask_ratio))).round()
    count = count.clamp(min_visible, max_visible)[:, None]  # of visible patches, [B, 1]
    position = torch.arange(patches, device=order.device)  # in `order`
    return Masks(visible, hidden, torch.cat([position[:max_visible] < count, position[-predicted:] >= count], dim=1))


class UncertaintyHead(nn.Module):
    """A denoiser with a head that learns the logarithm of its error at each noise level.

    The log error u is a learned linear function of cos(k time) and sin(k time), k = 1 .. 16, and initially 0 (Karras et
    al., 2024; Kendall et al., 2018). Its parameters are trained, saved and averaged (EMA) with those of the network.

    Args:
        network: called as ``network(x, time, label)``, with time [B] between -pi and pi.
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
        """Call the network.

        Args:
            x: float32 [B, C, H, W].
            time: float32 [B].
            label: int64 [B]; -1 for no label.
            uncertainty: whether to return the log error too.

        Returns:
            The network's output, [B, C, H, W]; with `uncertainty` also u, float32 [B].
        """
        output = self.network(x, time, label)
        if not uncertainty:
            return output
        phase = time[:, None] * torch.arange(1, 17, device=time.device)
        with torch.autocast(time.device.type, enabled=False):  # part of the loss, which is computed in float32
            return output, self.log_error(torch.cat([phase.cos(), phase.sin()], dim=1)).squeeze(1)
