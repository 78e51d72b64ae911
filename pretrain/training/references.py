"""The references of posterior-mean targets: all training images, on the device that trains."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pretrain.adapters import Adapter
from pretrain.adapters._posterior import References
from pretrain.config.schema import Config
from pretrain.core.errors import UserError
from pretrain.core.rng import SampleRNG
from pretrain.data.images import on_device
from pretrain.data.sources import Source

MAX_BYTES = 4 * 1024**3  # of references as float32
BATCH = 256  # images read at once
PROBES, LEVELS = 64, 32  # images, and levels of each, for the message about where the references matter
AMBIGUOUS = 0.01  # posterior probability of other images above which they matter


def with_references(
    config: Config, adapter: Any, source: Source, device: torch.device, log: Callable[[str], Any]
) -> Adapter:
    """The objective in training: the adapter, bound to references if its `posterior_mean` is set.

    Args:
        config: settings of the run.
        adapter: the objective; with `posterior_mean` it has `path(level)` and takes `references` by keyword.
        source: the data set.
        device: that trains.
        log: called with a message about the level from which on other images matter.

    Raises:
        UserError: the data set is too large, or is augmented by random crops.
    """
    if not getattr(adapter, "posterior_mean", False):
        return adapter
    images, flip = source.train, source.train.data.flip
    if source.autoencoder or images.data.crop < 1:
        kind = "latents, which are sampled anew in every epoch" if source.autoencoder else "random crops"
        raise UserError(f"--adapter.posterior-mean: not possible with {kind}; leave one of them out")
    if (size := 4 * images.shape[0] * images.shape[1] * images.shape[2] * len(images) * (1 + flip)) > MAX_BYTES:
        raise UserError(
            f"--adapter.posterior-mean: {len(images):,} images are {size / 1024**3:.1f} GiB as float32, at most "
            f"{MAX_BYTES / 1024**3:.0f} are possible; leave it out, on so many images it changes next to nothing"
        )
    parts = [on_device(batch, device) for batch in images.batches(range(len(images)), BATCH)]
    image, label = torch.cat([part.image for part in parts]), torch.cat([part.label for part in parts])
    if flip:
        image, label = torch.cat([image, image.flip(-1)]), label.repeat(2)
    references = References.of(image, label if config.class_conditional else None)
    log(_where_it_acts(adapter, references, image, label, len(parts)))
    return partial(adapter, references=references)


def _where_it_acts(adapter: Any, references: References, image: torch.Tensor, label: torch.Tensor, seed: int) -> str:
    probe = torch.linspace(0, len(image) - 1, PROBES, device=image.device).long()
    for step in range(LEVELS):
        rng = SampleRNG(seed, step, index=probe)
        signal, noise = adapter.path(torch.full((PROBES,), (step + 0.5) / LEVELS, device=image.device))
        noisy = signal.view(-1, 1, 1, 1) * image[probe] + noise.view(-1, 1, 1, 1) * rng.normal(*image.shape[1:])
        weights = references.weights(noisy, signal, noise, label[probe])
        if 1 - weights[torch.arange(PROBES), probe].mean() > AMBIGUOUS:
            return (
                f"posterior-mean targets over {len(image):,} images: a noisy image could come from others of them from "
                f"level {step / LEVELS:.2f} on"
            )
    return f"posterior-mean targets over {len(image):,} images change nothing: no noisy image could come from another"
