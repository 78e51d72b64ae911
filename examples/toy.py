"""What the loops in this folder train on: points of three classes, some easy and some hard, and a small network."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

SIZE, FEATURES, CLASSES = 1200, 16, 3


def data(seed: int = 0) -> TensorDataset:
    """Points (features float32, class int64) around three centres, near them or far."""
    rng = torch.Generator().manual_seed(seed)
    centre = 1.5 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(7))
    label = torch.randint(CLASSES, (SIZE,), generator=rng)
    distance = 0.2 + 2.5 * torch.rand(SIZE, 1, generator=rng) ** 3
    return TensorDataset(centre[label] + distance * torch.randn(SIZE, FEATURES, generator=rng), label)


def network() -> nn.Module:
    """The same initial parameters at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of unseen points whose class is found."""
    features, label = data(seed=1).tensors
    return (model(features).argmax(dim=1) == label).float().mean().item()


def rate(progress: float) -> float:
    """Learning rate over the progress of the training, in [0, 1]."""
    return 0.05 * (1 - progress)


def report(model: nn.Module, visited: int, epochs: int) -> str:
    """The last line that every loop prints."""
    return f"{visited:,} visits instead of {SIZE * epochs:,}, accuracy {accuracy(model):.3f}"
