"""Posterior-mean targets: the expected clean image given the noisy one, over the training set."""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_NOISE = 1e-2  # standard deviation; below it the posterior is the image itself, and float32 would not resolve it


class References(NamedTuple):
    """The training images, as a uniform prior over clean images.

    A noisy image x_t = a x + s noise may come from any training image x_j, with probability w_j proportional to
    exp(-|x_t - a x_j|^2 / (2 s^2)). Replacing x by the mean of x_j under w leaves the expected gradient as it is, since
    w is the distribution of x given x_t, and takes the noise of the choice out of the target (Bertrand et al. 2025, "On
    the closed-form of flow matching", proposition 2; Xu et al. 2023, "Stable target field"). That holds only if the
    references are all images that are trained on, mirrored ones included, each as often as it is used times its weight:
    the whole set with a uniform prior under every unbiased policy, never the pruned batch.

    Attributes:
        image: float32 [M, C * H * W].
        half_square: float32 [M]; |x_j|^2 / 2.
        label: int64 [M], of a network that is conditioned on labels: an image's references are those of its class, or
            all if its label was dropped; None: no condition.
    """

    image: Tensor
    half_square: Tensor
    label: Tensor | None

    @classmethod
    def of(cls, image: Tensor, label: Tensor | None) -> "References":
        """References from images [M, C, H, W] and labels int64 [M]."""
        flat = image.flatten(1).float()
        return cls(flat, flat.square().sum(1) / 2, label)

    def weights(self, noisy: Tensor, signal: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        """The posterior probabilities of the references, float32 [B, M]; see `mean` for the arguments."""
        a, s = signal.float()[:, None], noise.float().clamp(min=MIN_NOISE)[:, None]
        logits = (a * (noisy.flatten(1).float() @ self.image.T) - a.square() * self.half_square) / s.square()
        if self.label is not None:
            logits = logits.masked_fill((label[:, None] >= 0) & (label[:, None] != self.label), -torch.inf)
        return logits.softmax(1)

    @torch.no_grad()
    def mean(self, clean: Tensor, noisy: Tensor, signal: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        """The posterior mean of the clean image.

        Args:
            clean: [B, C, H, W]; the images that were made noisy; returned where the noise is below `MIN_NOISE`.
            noisy: [B, C, H, W]; signal * clean + noise * a standard normal.
            signal, noise: [B].
            label: int64 [B]; the condition of the network, -1 for none.

        Returns:
            float32 [B, C, H, W].
        """
        with torch.autocast(noisy.device.type, enabled=False):
            found = (self.weights(noisy, signal, noise, label) @ self.image).view_as(clean)
        return torch.where(noise.view(-1, 1, 1, 1) < MIN_NOISE, clean, found)
