"""How good a trained run is, beyond its held-out loss: a Fréchet distance, a linear probe.

The Fréchet distance needs features. Where no Inception weights are given, they come from a small classifier
that is trained here on the run's own data set, so nothing is downloaded: it ranks runs on that data set, and
its numbers compare with nothing else.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from pretrain.adapter import Generative
from pretrain.data import Images, on_device
from pretrain.errors import Refused
from pretrain.rng import Draws, generator
from pretrain.sampling import generate
from pretrain.sources import Source
from pretrain.trained import Trained

MOST = 10_000  # images that a classifier, a probe or a distance looks at
WIDTH = 64  # of the small classifier's features
TURNS = 4  # quarter turns: the classes of images that have no labels


class Classifier(nn.Module):
    """A small convolutional network; what comes before its last layer are the features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        sizes = (channels, 32, 64, 64)
        layers: list[nn.Module] = []
        for n, (i, o) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(i, o, 3, stride=1 + (n > 0), padding=1), nn.GroupNorm(8, o), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 64, WIDTH), nn.SiLU())
        self.head = nn.Linear(WIDTH, classes)
        self.num_features = WIDTH  # torchmetrics asks for it

    def forward(self, image: Tensor) -> Tensor:
        """Features [B, WIDTH] of uint8 images [B, C, H, W]."""
        return self.body(image.float() / 127.5 - 1)


def _tensor(images: Images, most: int = MOST) -> tuple[Tensor, Tensor]:
    """uint8 [N, C, H, W] and labels [N], of at most so many images, evenly apart."""
    stride = -(-len(images) // most)
    batches = list(images.batches(range(0, len(images), stride), 500))
    return torch.cat([batch.image for batch in batches]), torch.cat([batch.label for batch in batches])


def _turned(image: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The images as they are where they have labels, else each turned, with its turn as its label."""
    if classes:
        return image[label >= 0], label[label >= 0]
    if image.shape[-1] != image.shape[-2]:
        turns = [image, image.flip((-1, -2))]
    else:
        turns = [image.rot90(turn, (-2, -1)) for turn in range(TURNS)]
    return torch.cat(turns), torch.arange(len(turns)).repeat_interleave(len(image))


def train_classifier(source: Source, path: Path, epochs: int = 8, batch: int = 128) -> float:
    """Train the classifier on the data set, to tell its classes, or quarter turns where it has none; write it.

    Returns:
        Its accuracy on the held-out images.
    """
    image, label = _turned(*_tensor(source.train), source.classes)
    torch.manual_seed(0)
    network = Classifier(source.shape[0], source.classes or TURNS)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    steps = epochs * -(-len(image) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    draw = generator(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(image), generator=draw).split(batch):
            cross_entropy(network.head(network(image[chosen])), label[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    image, label = _turned(*_tensor(source.test), source.classes)
    with torch.no_grad():
        right = torch.cat([network.head(network(part)).argmax(1) for part in image.split(500)]) == label
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), path)
    return right.float().mean().item()


def features(path: Path) -> nn.Module:
    """The network of a weights file: the small classifier's (safetensors), or Inception's as torch-fidelity has it.

    Raises:
        Refused: it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
            network: Any = Classifier(state["body.0.weight"].shape[1], len(state["head.bias"]))
            network.load_state_dict(state)
            return network.eval()
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    except Exception as error:
        raise Refused(f"--features {path}: not weights of a feature network: {' '.join(str(error).split())}") from None


@torch.no_grad()
def frechet_distance(run: Trained, network: nn.Module, count: int, steps: int, batch: int = 250) -> float:
    """Distance of so many generated images from the training images (Heusel et al. 2017, equation 6).

    Image n has the same noise, and the same label, in every run.
    """
    assert isinstance(run.adapter, Generative)
    device, classes = next(run.model.parameters()).device, run.source.classes if run.config.conditional else 0
    distance = FrechetInceptionDistance(feature=network.to(device)).to(device)
    deep = 3 if isinstance(network, NoTrainInceptionV3) else run.source.shape[0]
    real, _ = _tensor(run.source.train)
    for part in real.split(batch):
        distance.update(part.to(device).expand(-1, deep, -1, -1), real=True)
    for which in torch.arange(count, device=device).split(batch):
        noise = Draws(0, index=which).normal(*run.source.shape)
        label = which % classes if classes else torch.full_like(which, -1)
        made = generate(run.model, run.adapter, noise, label, steps=steps, guidance=run.config.evaluate.guidance)
        pixels = ((made + 1) * 127.5).round().clamp(0, 255).byte()
        distance.update(pixels.expand(-1, deep, -1, -1), real=False)
    return distance.compute().item()


@torch.no_grad()
def _encoded(run: Trained, images: Images) -> tuple[np.ndarray, np.ndarray]:
    encoder: Callable[[Tensor], Tensor] = run.model.encoder  # type: ignore[assignment]
    device = next(run.model.parameters()).device
    found, labels = [], []
    for plain in images.batches(range(0, len(images), -(-len(images) // MOST)), 250):
        batch = on_device(plain, device)
        found.append(encoder(batch.image[batch.label >= 0]).cpu())
        labels.append(batch.label[batch.label >= 0].cpu())
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def linear_probe(run: Trained) -> float:
    """Accuracy on held-out images of a logistic regression on the frozen encoder's standardised features."""
    feature, label = _encoded(run, run.source.train)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-3))
    return float(probe.fit(feature, label).score(*_encoded(run, run.source.test)))
