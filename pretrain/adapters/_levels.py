"""Densities and weights of noise levels, building blocks of adapters.

An adapter's density and weight of noise levels are part of the objective. A model of unlimited capacity would learn the
same under any of them; a real one learns best the levels that count most. InfoBatch, too, may draw some levels more
densely, but divides the loss by that density, which changes only the variance of the gradient.
"""

import torch
from torch import Tensor


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
