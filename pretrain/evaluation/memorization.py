"""Whether generated images are copies of training images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.data.images import on_device
from pretrain.evaluation.context import (
    BATCH_SIZE,
    EvalContext,
    describe_generated,
    map_generated,
    map_images,
    mean_over_seeds,
    some_images,
)

COPY = 1 / 3  # of the distance to the second nearest training image, below which the nearest one was copied


def make(context: EvalContext, names: list[str]) -> "Memorization":
    """The evaluator of the metric memorization."""
    context.check_sampling()
    return Memorization(context)


@dataclass(frozen=True)
class Memorization:
    """How near generated images are to training images, in the values that the network generates (pixels or latents).

    - `memorized`: share of generated images whose nearest training image is less than a third as far away as the second
      nearest (Yoon et al. 2023, "Diffusion probabilistic models generalize when they fail to memorize").
    - `nearest_ratio`: their mean distance to the nearest training image, divided by that of held-out images; well below
      1 where a model repeats what it was trained on.

    Attributes:
        context: what is evaluated.
    """

    context: EvalContext

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics by name, see `mean_over_seeds`."""
        device, test = next(model.parameters()).device, self.context.source.test
        index = some_images(test, self.context.settings.num_images)
        (held_out,) = map_images(test, index, device, lambda batch: (batch.image,))
        unseen = self.nearest_two(held_out.to(device))[:, 0].mean()

        def compare(seed: int) -> dict[str, float]:
            image = map_generated(self.context, model, seed, lambda image: image, decode=False)
            first, second = self.nearest_two(image.to(device)).unbind(1)
            return {
                "memorized": (first < COPY * second).double().mean().item(),
                "nearest_ratio": (first.mean() / unseen).item(),
            }

        return mean_over_seeds(compare, self.context.settings.seeds)

    def nearest_two(self, image: Tensor) -> Tensor:
        """float32 [N, 2]; distances of images [N, C, H, W] to the nearest two training images.

        If training mirrors its images, the nearer one of an image and its mirror image counts.
        """
        train, query = self.context.source.train, image.flatten(1)
        mirrored = train.data.flip and self.context.source.autoencoder is None
        found = torch.full((len(query), 2), torch.inf, device=query.device)
        for batch in train.batches(range(len(train)), BATCH_SIZE):
            reference = on_device(batch, query.device).image
            distance = torch.cdist(query, reference.flatten(1))
            if mirrored:
                distance = distance.minimum(torch.cdist(query, reference.flip(-1).flatten(1)))
            found = torch.cat([found, distance], 1).topk(2, largest=False).values
        return found

    @property
    def note(self) -> str:
        """How the metrics were measured."""
        count = len(self.context.source.train)
        return f"{describe_generated(self.context)}, and held-out images, compared with {count:,} training images"
