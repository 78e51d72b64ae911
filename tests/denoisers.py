"""Optimal denoisers in closed form, and noise schedules by their papers' formulas, for tests."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.adapters import Batch
from pretrain.adapters.ddpm import DDPM
from pretrain.adapters.edm import EDM
from pretrain.adapters.flow import Flow

SHAPE = (1, 8, 8)


def batch(size: int = 6) -> Batch:
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(size, *SHAPE, generator=rng) * 2 - 1
    return Batch(image, torch.arange(size) % 3, torch.arange(size) + 10, (torch.arange(size) + 0.5) / size)


def column(value: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]."""
    return value[:, None, None, None]


def signal(schedule: str, timesteps: int = 1000, zero: bool = False) -> Tensor:
    """float64 [T]; the image's share of the variance, alpha bar."""
    t = torch.arange(timesteps, dtype=torch.float64)
    if schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation 17

        def f(u: Tensor) -> Tensor:
            return ((u / timesteps + 0.008) / 1.008 * math.pi / 2).cos() ** 2

        beta = (1 - f(t + 1) / f(t)).clamp(max=0.999)
    else:
        ramp = t / (timesteps - 1)
        beta = 1e-4 + (0.02 - 1e-4) * (1 / (1 + (6 - 12 * ramp).exp()) if schedule == "sigmoid" else ramp)
    kept = (1 - beta).cumprod(0).sqrt()
    if zero:  # Lin et al. 2024, algorithm 1
        kept = (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])
    return kept**2


class Oracle(nn.Module):
    """A network that returns a fixed tensor and records its inputs."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        self.asked = x, time, label
        return self.answer


class Best(nn.Module):
    """The optimal denoiser for pixels that are normal with a mean and a standard deviation, by Bayes' rule.

    It derives the amounts of image and noise from the time, and returns what the adapter predicts.
    """

    def __init__(self, adapter: Any, mean: float | Tensor, std: float) -> None:
        super().__init__()
        self.adapter, self.mean, self.std = adapter, mean, std
        if isinstance(adapter, DDPM):
            self.signal = signal(adapter.noise_schedule, adapter.timesteps, adapter.zero_terminal_snr)

    def parts(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of image and noise, float32 [B]."""
        match self.adapter:
            case Flow():
                return 1 - time / 1000, time / 1000
            case EDM():
                return torch.ones_like(time), (4 * time).exp()
        signal = self.signal[time.round().long()]  # some samplers have float timesteps
        return signal.sqrt().float(), (1 - signal).sqrt().float()

    def error(self, time: Tensor) -> Tensor:
        """Its expected squared error, float32 [B], of what the adapter predicts."""
        a, s = self.parts(time)
        image = self.std**2 * s**2 / (a**2 * self.std**2 + s**2)  # the variance of the image given the noisy one
        match self.adapter:
            case DDPM(prediction="sample"):
                return image
            case DDPM(prediction="epsilon"):
                return image * a**2 / s**2
            case EDM(sigma_data=data):
                return image * (s**2 + data**2) / (s * data) ** 2  # Karras et al. 2022, table 1
        return image / s**2

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        a, s = map(column, self.parts(time))
        if isinstance(self.adapter, EDM):
            data = self.adapter.sigma_data
            norm = (s**2 + data**2).sqrt()
            x = x * norm
        share = (x - a * self.mean) / (a**2 * self.std**2 + s**2)
        image, noise = self.mean + a * self.std**2 * share, s * share
        match self.adapter:
            case Flow():
                return noise - image
            case EDM():
                return (image - data**2 / norm**2 * x) / (s * data / norm)
            case DDPM(prediction="sample"):
                return image
            case DDPM(prediction="epsilon"):
                return noise
        return a * noise - s * image
