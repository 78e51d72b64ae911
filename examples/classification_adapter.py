"""Image classification as an objective."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from pretrain.adapters import Batch, Losses
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class Classification:
    """Cross entropy; what is remembered is the loss without label smoothing, which is nearer to 0 for what is learned.

    Attributes:
        smoothing: of the labels, in [0, 1) (Szegedy et al., 2016).
    """

    smoothing: float = 0.1

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass; neither level nor rng is used."""
        logits = model(batch.image).float()
        loss = F.cross_entropy(logits, batch.label, reduction="none", label_smoothing=self.smoothing)
        return Losses(loss, F.cross_entropy(logits.detach(), batch.label, reduction="none"))
