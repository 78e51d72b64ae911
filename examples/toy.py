"""The data and the network of plain_loop.py, ddp.py, hf_trainer.py and lightning_module.py.

Points of three classes, easy and hard ones, and an MLP.
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

SIZE, FEATURES, CLASSES = 1200, 16, 3


def data(seed: int = 0) -> TensorDataset:
    """Points around three centers, at small and large distances: float32 [SIZE, FEATURES], and classes int64 [SIZE]."""
    rng = torch.Generator().manual_seed(seed)
    center = 1.5 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(7))
    label = torch.randint(CLASSES, (SIZE,), generator=rng)
    distance = 0.2 + 2.5 * torch.rand(SIZE, 1, generator=rng) ** 3
    return TensorDataset(center[label] + distance * torch.randn(SIZE, FEATURES, generator=rng), label)


def network() -> nn.Module:
    """An MLP, with the same initial parameters at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Accuracy on new points."""
    features, label = data(seed=1).tensors
    return (model(features).argmax(dim=1) == label).float().mean().item()


def learning_rate(progress: float) -> float:
    """Learning rate at a progress of the training in [0, 1]."""
    return 0.05 * (1 - progress)


def report(model: nn.Module, samples_used: int, epochs: int) -> str:
    """The last line that every loop prints."""
    return f"{samples_used:,} samples used instead of {SIZE * epochs:,}, accuracy {accuracy(model):.3f}"
