"""Denoising with N:M sparse subnetworks (models/nm.py), against dense networks, on held-out images.

    python examples/restoration.py                                          # Fashion-MNIST, ships with the package
    python examples/restoration.py --data path/to/images --arms narrow level
    python examples/restoration.py --training.policy importance --training.budget 0.7

The FLOPs are those of a forward pass for one image if masked weights cost nothing. GPUs have kernels for 2 of 4 alone,
and training computes all products: this lowers the cost of inference, not of training.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from fit import Training, device, epoch_batches, fit, run, write_json
from pretrain.models.nm import NMConfig, NMNetwork
from restoration_adapter import Restoration
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain import InfoBatch
from pretrain.adapters import Batch
from pretrain.config.schema import Data
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.images import on_device
from pretrain.data.preload import preload
from pretrain.data.sources import Source, open_data

RANGES = 3  # of the noise level, for which the quality is printed
DRAWS = 4  # of the noise of each held-out image
Arm = Literal["dense", "narrow", "2:4", "level", "reversed", "image"]


class Block(nn.Module):
    """Two convolutions around a ReLU, and a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The output, of the shape of x, [B, D, H, W]."""
        return x + self.conv2(F.relu(self.conv1(x)))


class ResidualCNN(nn.Module):
    """A denoiser for any noise level: residual blocks at half the resolution, which see the level as one more channel.

    After FFDNet (Zhang et al., 2018).

    Args:
        channels: of the images.
        width: channels of the blocks.
        blocks: number of blocks.
    """

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(4 * channels + 1, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.last = nn.Conv2d(width, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """The noise in x, [B, C, H, W], at times [B] in [0, 1000]; labels are ignored."""
        rows, columns = x.shape[2:]
        y = F.pixel_unshuffle(F.pad(x, (0, columns % 2, 0, rows % 2), mode="replicate"), 2)
        level = (time / 1000).to(y.dtype)[:, None, None, None].expand(-1, 1, *y.shape[2:])
        y = self.first(torch.cat([y, level], dim=1))
        for block in self.blocks:
            y = block(y)
        return F.pixel_shuffle(self.last(y), 2)[:, :, :rows, :columns]


@torch.no_grad()
def forward_flops(network: nn.Module, shape: tuple[int, int, int]) -> list[int]:
    """FLOPs of a forward pass for one image, of a sparse network by choice."""
    inputs = (torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    if isinstance(network, NMNetwork):
        return network.forward_flops(*inputs)
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return [counter.get_total_flops()]


def build(arm: Arm, shape: tuple[int, int, int], width: int, blocks: int, budget: float) -> nn.Module:
    """The network of an arm; `narrow` is the smallest dense one with at least the FLOPs that the budget allows."""
    channels = shape[0]
    if arm == "dense":
        return ResidualCNN(channels, width, blocks)
    if arm == "narrow":
        _, half, whole = forward_flops(build("level", shape, width, blocks, budget), shape)
        allowed = half + (whole - half) * (budget - 0.5) / 0.5  # linear in N / M
        narrower = (ResidualCNN(channels, smaller, blocks) for smaller in range(1, width + 1))
        return next(network for network in narrower if forward_flops(network, shape)[0] >= allowed)
    config = {
        "2:4": NMConfig(choices=(2,)),
        "level": NMConfig(budget=budget),
        "reversed": NMConfig(choices=(4, 2, 1), budget=budget),
        "image": NMConfig(by="image", budget=budget),
    }[arm]
    return config.wrap(ResidualCNN(channels, width, blocks), channels)


@torch.no_grad()
def measure(network: nn.Module, adapter: Restoration, source: Source) -> dict[str, Any]:
    """Peak signal-to-noise ratio in dB of restored held-out images, and the FLOPs that they cost.

    Returns:
        psnr: mean over images and levels; psnr_by_level: the same in `RANGES` equal ranges, from the least noise;
        noisy: psnr_by_level of the images before; flops: mean of a forward pass over the images.
    """
    found: list[Tensor] = []
    for batch in source.test.batches(range(len(source.test)), 250):
        batch = on_device(batch, device())
        for draw in range(DRAWS):
            rng = SampleRNG(0, draw, index=batch.index)
            level = (SampleRNG(1, index=batch.index).uniform() + draw / DRAWS) % 1
            x, noise, sigma = adapter.noisy(batch._replace(level=level), rng)
            output = network(x, 1000 * level, batch.label)
            choice = (
                network.choice_of(x, 1000 * level) if isinstance(network, NMNetwork) else torch.zeros_like(batch.label)
            )
            errors = [
                (sigma[:, None, None, None] * (noise - predicted)).square().mean(dim=(1, 2, 3))
                for predicted in (output, torch.zeros_like(noise))
            ]
            found.append(torch.stack([level, choice, *(10 * (4 / error).log10() for error in errors)]).double().cpu())
    level, choice, psnr, before = torch.cat(found, dim=1)
    place = (level * RANGES).long().clamp(max=RANGES - 1)
    by_level = [[values[place == n].mean().item() for n in range(RANGES)] for values in (psnr, before)]
    flops = torch.tensor(forward_flops(network.cpu(), source.shape)).double()[choice.long()].mean().item()
    return {"psnr": psnr.mean().item(), "psnr_by_level": by_level[0], "noisy": by_level[1], "flops": flops}


def train(network: nn.Module, source: Source, adapter: Restoration, training: Training) -> nn.Module:
    """Train a network, and return it."""
    network.to(device(), memory_format=torch.channels_last)
    used: list[InfoBatch] = []

    def batches(infobatch: InfoBatch) -> Iterator[Batch]:
        used.append(infobatch)
        for batch in epoch_batches(source.train, training.batch_size, infobatch):
            yield batch._replace(level=infobatch.level(batch.index))

    def objective(model: nn.Module, batch: Batch, rng: SampleRNG) -> Any:
        return adapter(model, batch, rng, used[-1].progress)

    fit(training, network, objective, len(source.train), batches, weights=source.weights, over="both")
    return network


def main(
    data: Data = Data(limit=3000),
    arms: tuple[Arm, ...] = ("dense", "narrow", "2:4", "level", "reversed", "image"),
    width: int = 32,
    blocks: int = 5,
    budget: float = 0.6,
    adapter: Restoration = Restoration(),
    training: Training = Training(epochs=10, policy="full", lr=2e-3),
    output: Path | None = None,
) -> dict[str, Any]:
    """Train a denoiser by several ways to spend fewer FLOPs and print its quality on held-out images.

    Args:
        data: the images.
        arms: dense; narrow, a dense network of the FLOPs that the budget allows; 2:4, the same mask for all images;
            level, a choice of 1:4, 2:4 and 4:4 by the noise level, more weights for more noise; reversed, fewer weights
            for more noise; image, a choice by a classifier.
        width: channels of the network.
        blocks: residual blocks of the network.
        budget: mean of N / M over noise levels or images, between 0.25 and 1.
        adapter: settings of the objective.
        training: settings of the training.
        output: file to write the results to, as JSON.

    Raises:
        UserError: the budget or the width does not fit the choices.
    """
    source = open_data(data, training.seed)
    preload(source.train, device(), print)
    found: dict[str, Any] = {}
    for arm in arms:
        print(f"-- {arm}")
        torch.manual_seed(training.seed)
        try:
            network = build(arm, source.shape, width, blocks, budget)
        except ValueError as error:
            raise UserError(str(error)) from None
        found[arm] = measure(train(network, source, adapter, training), adapter, source)
        write_json(output, {"seed": training.seed, "arms": found})
    step = (adapter.high - adapter.low) / RANGES
    heads = [f"{adapter.low + n * step:.0f}-{adapter.low + (n + 1) * step:.0f}" for n in range(RANGES)]
    print(f"\n{'PSNR (dB), noise':<17}" + "".join(f"{head:>8}" for head in (*heads, "all")) + "  forward MFLOPs")
    rows = {"noisy": {"psnr_by_level": next(iter(found.values()))["noisy"]}, **found} if found else {}
    for arm, values in rows.items():
        numbers = "".join(f"{value:8.2f}" for value in (*values["psnr_by_level"], *filter(None, [values.get("psnr")])))
        print(f"{arm:<17}{numbers}" + (f"{values['flops'] / 1e6:16.2f}" if "flops" in values else ""))
    return found


if __name__ == "__main__":
    run(main)
