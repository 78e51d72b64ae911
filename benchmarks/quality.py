"""Quality of a run beyond its validation loss: a Fréchet distance and a linear probe.

    python benchmarks/quality.py      # train the small feature network that ships with the package, on its images

The features of the Fréchet distance are those of a small classifier that is trained here on the run's data set, so that
nothing is downloaded. Such distances compare runs on that data set; they can't be compared with published ones.
"""

import dataclasses
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
from pretrain.data.images import Images
from pretrain.data.sources import Source, open_data
from pretrain.evaluation.context import EvalContext, some_images
from pretrain.evaluation.feature_extractors import SMALL, Classifier
from pretrain.evaluation.fid import make
from pretrain.evaluation.knn import labelled_features

MAX_IMAGES = 10_000  # for training the classifier, the probe and the distance
ROTATIONS = 4  # by quarter turns, the classes if images have no labels


def _tensor(images: Images) -> tuple[Tensor, Tensor]:
    """At most `MAX_IMAGES` images, uint8 [N, C, H, W], and their labels, int64 [N]."""
    batches = list(images.batches(some_images(images, MAX_IMAGES), 500))
    return torch.cat([batch.image for batch in batches]), torch.cat([batch.label for batch in batches])


def _task(image: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The images with labels; if there are no classes, rotated images with the rotation as label."""
    if classes:
        return image[label >= 0], label[label >= 0]
    if image.shape[-1] != image.shape[-2]:
        rotated = [image, image.flip((-1, -2))]
    else:
        rotated = [image.rot90(turns, (-2, -1)) for turns in range(ROTATIONS)]
    return torch.cat(rotated), torch.arange(len(rotated)).repeat_interleave(len(image))


def train_classifier(source: Source, path: Path, epochs: int = 8, batch: int = 128) -> float:
    """Train the classifier of a data set's classes, or of rotations if it has none, and write it to a file.

    Args:
        source: the data set.
        path: of the safetensors file.
        epochs, batch: of the training.

    Returns:
        Its accuracy on the held-out images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image, label = (column.to(device) for column in _task(*_tensor(source.train), source.classes))
    torch.manual_seed(0)
    network = Classifier(source.shape[0], source.classes or ROTATIONS).to(device)
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
    image, label = (column.to(device) for column in _task(*_tensor(source.test), source.classes))
    with torch.no_grad():
        correct = torch.cat([network.head(network(chunk)).argmax(1) for chunk in image.split(500)]) == label
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu() for name, value in network.state_dict().items()}, path)
    return correct.float().mean().item()


def frechet_distance(run: LoadedRun, features: str, count: int, steps: int) -> float:
    """Fréchet distance of generated images from the training images.

    Image n is generated from the same noise and label in every run.

    Args:
        run: with a generative objective.
        features: feature network, as in `pretrain evaluate --features`.
        count: number of generated images.
        steps: sampling steps.
    """
    settings = dataclasses.replace(
        run.config.evaluate, features=features, num_images=count, steps=steps, max_reference=MAX_IMAGES
    )
    context = EvalContext(run.adapter, run.source, run.classes, False, settings)
    return make(context, ["fid"])(run.model)["fid"]


def linear_probe(run: LoadedRun) -> float:
    """Accuracy on held-out images of a logistic regression on the frozen encoder's standardized features.

    It learns from at most `MAX_IMAGES` of all training images, also of a run on a subset of them.
    """

    def encoded(images: Images) -> list[np.ndarray]:
        return [column.numpy() for column in labelled_features(run.model, images, some_images(images, MAX_IMAGES))]

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-3))
    return float(probe.fit(*encoded(run.whole_source.train)).score(*encoded(run.source.test)))


if __name__ == "__main__":
    accuracy = train_classifier(open_data(Data(), 0), SMALL, epochs=30)
    print(f"{SMALL}: accuracy {accuracy:.1%} on held-out images")  # noqa: T201
