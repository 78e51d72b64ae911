"""How good a trained run is, beyond its validation loss: a Fréchet distance, a linear probe.

The Fréchet distance needs features. Where no Inception weights are given, they come from a small classifier
that is trained here on the run's own data set, so nothing is downloaded: it ranks runs on that data set, and
its numbers compare with nothing else.

    python benchmarks/quality.py

trains the small feature network that ships with the package, on the images that ship with it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

from pretrain.checkpoint.load_run import LoadedRun
from pretrain.config.schema import Data
from pretrain.core.rng import generator
from pretrain.data.images import Images, on_device
from pretrain.data.sources import Source, open_data
from pretrain.evaluation.context import EvalContext
from pretrain.evaluation.feature_extractors import SMALL, Classifier
from pretrain.evaluation.fid import make

MOST = 10_000  # images that a classifier, a probe or a distance looks at
TURNS = 4  # quarter turns: the classes of images that have no labels


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image, label = (column.to(device) for column in _turned(*_tensor(source.train), source.classes))
    torch.manual_seed(0)
    network = Classifier(source.shape[0], source.classes or TURNS).to(device)
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
    image, label = (column.to(device) for column in _turned(*_tensor(source.test), source.classes))
    with torch.no_grad():
        right = torch.cat([network.head(network(part)).argmax(1) for part in image.split(500)]) == label
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu() for name, value in network.state_dict().items()}, path)
    return right.float().mean().item()


def frechet_distance(run: LoadedRun, features: str, count: int, steps: int) -> float:
    """Distance of so many generated images from the training images, in a network's features.

    Image n has the same noise, and the same label, in every run.
    """
    settings = dataclasses.replace(
        run.config.evaluate, features=features, num_images=count, steps=steps, max_reference=MOST
    )
    subject = EvalContext(run.adapter, run.source, run.classes, False, settings)
    return make(subject, ["fid"])(run.model)["fid"]


@torch.no_grad()
def _encoded(run: LoadedRun, images: Images) -> tuple[np.ndarray, np.ndarray]:
    encoder: Callable[[Tensor], Tensor] = run.model.encoder  # type: ignore[assignment]
    device = next(run.model.parameters()).device
    found, labels = [], []
    for plain in images.batches(range(0, len(images), -(-len(images) // MOST)), 250):
        batch = on_device(plain, device)
        found.append(encoder(batch.image[batch.label >= 0]).cpu())
        labels.append(batch.label[batch.label >= 0].cpu())
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def linear_probe(run: LoadedRun) -> float:
    """Accuracy on held-out images of a logistic regression on the frozen encoder's standardised features."""
    feature, label = _encoded(run, run.source.train)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-3))
    return float(probe.fit(feature, label).score(*_encoded(run, run.source.test)))


if __name__ == "__main__":
    told = train_classifier(open_data(Data(), 0), SMALL, epochs=30)
    print(f"{SMALL}: {told:.1%} of the held-out images told rightly")  # noqa: T201
