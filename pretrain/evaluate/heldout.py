"""The loss on images that were never trained on."""

from dataclasses import dataclass

import torch
from torch import nn

from pretrain.adapter import Adapter
from pretrain.data import Images, on_device
from pretrain.rng import Draws

DRAWS = 2  # visits of one image, evenly apart on the level axis
BINS = 8  # of the level axis, for the loss by level


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss of held-out images on a fixed grid of levels and noises, and its mean by level.

    The draws are the same for every model, run and seed, so two models differ by what they are, not by luck.

    Attributes:
        adapter: the objective.
        images: held-out ones.
        batch_size: images at once.
    """

    adapter: Adapter
    images: Images
    batch_size: int = 250

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float | list[float]]:
        """The mean loss, and the mean loss by level, lowest first."""
        device = next(model.parameters()).device
        total = torch.zeros(2, BINS, dtype=torch.float64)  # of losses, of visits
        for plain in self.images.batches(range(len(self.images)), self.batch_size):
            batch = on_device(plain, device)
            start = Draws(0, index=batch.index).uniform()
            for draw in range(DRAWS):
                level = (start + draw / DRAWS) % 1.0
                rng = Draws(0, draw, index=batch.index)
                loss = self.adapter(model, batch._replace(level=level), rng).loss.double().cpu()
                bin = (level.cpu() * BINS).long().clamp(max=BINS - 1)
                total += torch.stack([torch.bincount(bin, weight, BINS) for weight in (loss, torch.ones_like(loss))])
        loss, visits = total
        by_level = (loss / visits.clamp(min=1)).tolist()
        return {"heldout_loss": (loss.sum() / visits.sum()).item(), "heldout_loss_by_level": by_level}
