"""The mean loss on validation images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter, Batch
from pretrain.core.rng import SampleRNG
from pretrain.data.images import Images
from pretrain.evaluation.context import EvalContext, map_images

DRAWS = 2  # losses per image, at equidistant levels
BINS = 8  # of the level in [0, 1], for the loss by level


def make(context: EvalContext, names: list[str]) -> "ValidationLoss":
    """The evaluator of the metric loss."""
    return ValidationLoss(context.adapter, context.source.test)


@dataclass(frozen=True)
class ValidationLoss:
    """Mean loss of validation images at fixed levels with fixed noise or masks, and its mean by level.

    The random numbers depend on the image's index alone, so the values of two models are comparable.

    Attributes:
        adapter: the objective.
        images: the validation images.
    """

    adapter: Adapter
    images: Images

    def __call__(self, model: nn.Module) -> dict[str, float | list[float | None]]:
        """The mean loss, and the mean in each of `BINS` bins of the level in ascending order; None: an empty bin."""

        def losses(batch: Batch) -> tuple[Tensor, Tensor]:
            start = SampleRNG(0, index=batch.index).uniform()
            loss, levels = [], [(start + draw / DRAWS) % 1.0 for draw in range(DRAWS)]
            for draw, level in enumerate(levels):
                rng = SampleRNG(0, draw, index=batch.index)
                loss.append(self.adapter(model, batch._replace(level=level), rng).loss.double())
            return torch.stack(loss, 1), torch.stack(levels, 1)

        device, index = next(model.parameters()).device, range(len(self.images))
        loss, level = (column.flatten() for column in map_images(self.images, index, device, losses))
        bin = (level * BINS).long().clamp(max=BINS - 1)
        total, count = (torch.bincount(bin, weight, BINS) for weight in (loss, torch.ones_like(loss)))
        by_level = [(t / n).item() if n else None for t, n in zip(total, count, strict=True)]
        return {"validation_loss": loss.mean().item(), "validation_loss_by_level": by_level}
