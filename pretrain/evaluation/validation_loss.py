"""The loss on images that were never trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.adapters import Adapter, Batch
from pretrain.core.rng import SampleRNG
from pretrain.data.images import Images
from pretrain.evaluation.context import EvalContext, over

DRAWS = 2  # visits of one image, evenly apart on the level axis
BINS = 8  # of the level axis, for the loss by level


def make(subject: EvalContext, names: list[str]) -> "ValidationLoss":
    """The evaluator of this file's metric."""
    return ValidationLoss(subject.adapter, subject.source.test)


@dataclass(frozen=True)
class ValidationLoss:
    """Mean loss of held-out images on a fixed grid of levels and noises, and its mean by level.

    The draws are the same for every model, run and seed, so two models differ by what they are, not by luck.

    Attributes:
        adapter: the objective.
        images: held-out ones.
    """

    adapter: Adapter
    images: Images

    def __call__(self, model: nn.Module) -> dict[str, float | list[float | None]]:
        """The mean loss, and the mean loss by level, lowest first; None where few images leave a level unvisited."""

        def visits(batch: Batch) -> tuple[Tensor, Tensor]:
            start = SampleRNG(0, index=batch.index).uniform()
            losses, levels = [], [(start + draw / DRAWS) % 1.0 for draw in range(DRAWS)]
            for draw, level in enumerate(levels):
                rng = SampleRNG(0, draw, index=batch.index)
                losses.append(self.adapter(model, batch._replace(level=level), rng).loss.double())
            return torch.stack(losses, 1), torch.stack(levels, 1)

        device = next(model.parameters()).device
        loss, level = (column.flatten() for column in over(self.images, range(len(self.images)), device, visits))
        bin = (level * BINS).long().clamp(max=BINS - 1)
        total, count = (torch.bincount(bin, weight, BINS) for weight in (loss, torch.ones_like(loss)))
        by_level = [(t / n).item() if n else None for t, n in zip(total, count, strict=True)]
        return {"validation_loss": loss.mean().item(), "validation_loss_by_level": by_level}
