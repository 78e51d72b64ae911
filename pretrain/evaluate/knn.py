"""How well an encoder's features tell classes apart, without training anything."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pretrain.data import Images, on_device


@dataclass(frozen=True)
class KNN:
    """Accuracy of a weighted vote of the k nearest training images, by cosine similarity (Wu et al. 2018, section 3.4).

    Attributes:
        features: (model, images [B, C, H, W]) -> [B, D].
        train: labelled images to be neighbours.
        test: labelled images to be told apart.
        classes: how many there are.
        k: neighbours.
        temperature: of the votes exp(similarity / temperature).
        most: training images used at most.
        batch_size: images at once.
    """

    features: Callable[[Any, Tensor], Tensor]
    train: Images
    test: Images
    classes: int
    k: int = 20
    temperature: float = 0.07
    most: int = 10_000
    batch_size: int = 250

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The share of test images told rightly; nothing where none has a label."""
        stride = -(-len(self.train) // self.most)
        known, known_label = self._encode(model, self.train, range(0, len(self.train), stride))
        asked, asked_label = self._encode(model, self.test, range(len(self.test)))
        if not len(asked) or not len(known):
            return {}
        right = 0
        for feature, label in zip(asked.split(self.batch_size), asked_label.split(self.batch_size), strict=True):
            similarity, neighbour = (feature @ known.T).topk(min(self.k, len(known)), dim=1)
            votes = torch.zeros(len(feature), self.classes, device=feature.device)
            votes.scatter_add_(1, known_label[neighbour], (similarity / self.temperature).exp())
            right += (votes.argmax(1) == label).sum().item()
        return {"knn_accuracy": right / len(asked)}

    def _encode(self, model: nn.Module, images: Images, index: range) -> tuple[Tensor, Tensor]:
        """Unit features [N, D] and labels [N] of the labelled ones among the images."""
        device = next(model.parameters()).device
        features, labels = [], []
        for plain in images.batches(index, self.batch_size):
            batch = on_device(plain, device)
            labelled = batch.label >= 0
            features.append(normalize(self.features(model, batch.image[labelled]), dim=1))
            labels.append(batch.label[labelled])
        return torch.cat(features), torch.cat(labels)
