"""The k-NN accuracy of an encoder's features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pretrain.adapters import Batch, bare
from pretrain.data.images import Images
from pretrain.evaluation.context import EvalContext, accuracy, map_images, some_images

MAX_TRAIN_IMAGES = 10_000  # that neighbours are searched among


def make(context: EvalContext, names: list[str]) -> "KNN":
    """The evaluator of the metric knn."""
    return KNN(context.source.train, context.source.test, context.source.classes)


def labelled_features(model: nn.Module, images: Images, index: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Encode images.

    Args:
        model: has an `encoder`.
        images: the data set.
        index: which images.

    Returns:
        Features float32 [N, D] and labels int64 [N] of those that have a label, on the CPU.
    """
    encoder = bare(model).encoder

    def encode(batch: Batch) -> tuple[Tensor, Tensor]:
        return encoder(batch.image).float(), batch.label

    feature, label = map_images(images, index, next(model.parameters()).device, encode)
    return feature[label >= 0], label[label >= 0]


@dataclass(frozen=True)
class KNN:
    """Accuracy of a weighted vote of the k nearest training images by cosine similarity (Wu et al. 2018, section 3.4).

    Attributes:
        train: where neighbours are searched.
        test: whose labels are predicted.
        classes: number of classes.
        k: number of neighbours.
        temperature: of the votes exp(similarity / temperature).
    """

    train: Images
    test: Images
    classes: int
    k: int = 20
    temperature: float = 0.07

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The accuracy on the labelled validation images.

        Raises:
            UserError: none of them can be read.
        """
        device = next(model.parameters()).device
        index = some_images(self.train, MAX_TRAIN_IMAGES)
        known, known_label = (column.to(device) for column in labelled_features(model, self.train, index))
        queries, label = labelled_features(model, self.test, range(len(self.test)))
        known, predicted = normalize(known, dim=1), []
        for feature in queries.split(256):
            feature = normalize(feature.to(device), dim=1)
            similarity, neighbour = (feature @ known.T).topk(min(self.k, len(known)), dim=1)
            votes = torch.zeros(len(feature), self.classes, device=device)
            votes.scatter_add_(1, known_label[neighbour], (similarity / self.temperature).exp())
            predicted.append(votes.argmax(1).cpu())
        return {"knn_accuracy": accuracy(torch.cat(predicted), label)}
