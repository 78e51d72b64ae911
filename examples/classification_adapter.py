"""Image classification as an objective."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from pretrain.adapters import Batch, Losses
from pretrain.core.rng import SampleRNG


@dataclass(frozen=True)
class Classification:
    """Cross entropy; the score is the loss without label smoothing, which is close to 0 for samples that are learned.

    Attributes:
        smoothing: label smoothing, in [0, 1) (Szegedy et al., 2016).
    """

    smoothing: float = 0.1

    def __call__(self, model: nn.Module, batch: Batch, rng: SampleRNG) -> Losses:
        """One forward pass; uses neither levels nor rng."""
        logits = model(batch.image).float()
        loss = F.cross_entropy(logits, batch.label, reduction="none", label_smoothing=self.smoothing)
        return Losses(loss, F.cross_entropy(logits.detach(), batch.label, reduction="none"))
