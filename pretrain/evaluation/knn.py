"""How well an encoder's features tell classes apart, without training anything."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pretrain.adapters import Batch, bare
from pretrain.data.images import Images
from pretrain.evaluation.context import EvalContext, evenly, over

MOST = 10_000  # training images that are neighbours at most


def make(subject: EvalContext, names: list[str]) -> "KNN":
    """The evaluator of this file's metric."""
    return KNN(subject.source.train, subject.source.test, subject.source.classes)


def encoded(model: nn.Module, images: Images, index: range) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels int64 [N] of the labelled ones among the images, on the CPU."""
    encoder = bare(model).encoder

    def rows(batch: Batch) -> tuple[Tensor, Tensor]:
        return encoder(batch.image).float(), batch.label

    feature, label = over(images, index, next(model.parameters()).device, rows)
    return feature[label >= 0], label[label >= 0]


@dataclass(frozen=True)
class KNN:
    """Accuracy of a weighted vote of the k nearest training images, by cosine similarity (Wu et al. 2018, section 3.4).

    Attributes:
        train: labelled images to be neighbours.
        test: labelled images to be told apart.
        classes: how many there are.
        k: neighbours.
        temperature: of the votes exp(similarity / temperature).
    """

    train: Images
    test: Images
    classes: int
    k: int = 20
    temperature: float = 0.07

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The share of test images told rightly; nothing where none has a label."""
        device = next(model.parameters()).device
        known, known_label = (column.to(device) for column in encoded(model, self.train, evenly(self.train, MOST)))
        asked, asked_label = encoded(model, self.test, range(len(self.test)))
        if not len(asked) or not len(known):
            return {}
        known, right = normalize(known, dim=1), 0
        for feature, label in zip(asked.split(256), asked_label.split(256), strict=True):
            feature = normalize(feature.to(device), dim=1)
            similarity, neighbour = (feature @ known.T).topk(min(self.k, len(known)), dim=1)
            votes = torch.zeros(len(feature), self.classes, device=device)
            votes.scatter_add_(1, known_label[neighbour], (similarity / self.temperature).exp())
            right += (votes.argmax(1).cpu() == label).sum().item()
        return {"knn_accuracy": right / len(asked)}
